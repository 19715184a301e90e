"""FedAdam: Flower's Adam on the server, guarded."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import Message

from fedpm_flwr.config import Config
from fedpm_flwr.method import Job
from fedpm_flwr.rivals.fedadam import METHOD

from .application import check_learns
from .quadratic import BROKEN, broken_arrays, check_left_out, theta_after

CONFIG = Config(
    learning_rate=0.1, local_steps=1, adam_eta=0.15, adam_beta_1=0.5, adam_beta_2=0.75, adam_tau=0.0375
)


def test_two_rounds_by_hand(tmp_path: Path) -> None:
    """η = 0.1, K = 1, β₁ = ½, β₂ = ¾, η_a = 0.15, τ = 0.0375.

    Round 1, θ = 0: Δ = 0.1/4 − 3·0.4/4 = −0.275; m = −0.1375; v = 0.275²/4, √v = 0.1375;
    m/(√v + τ) = −0.1375/0.175 = −11/14; θ = −0.15 · √(1 − 0.75²)/(1 − 0.5²) · 11/14
    = −0.2 · √0.4375 · 11/14 = −0.1039….
    Round 2: θ₀ − θ = 0.1(1 − θ), θ₁ − θ = −0.4(1 + θ), so Δ = −0.275 − 0.325θ; m = m/2 + Δ/2;
    v = ¾v + Δ²/4; the length is 0.15 · √(1 − 0.75³)/(1 − 0.5³) = 0.15 · √0.578125/0.875.
    """
    first = -0.2 * math.sqrt(0.4375) * 11 / 14
    assert theta_after(METHOD, CONFIG, tmp_path, 1) == pytest.approx(first, abs=1e-14)
    delta = -0.275 - 0.325 * first
    mean, square = -0.06875 + delta / 2, 0.75 * 0.01890625 + delta**2 / 4
    second = first + 0.15 * math.sqrt(0.578125) / 0.875 * mean / (math.sqrt(square) + 0.0375)
    assert theta_after(METHOD, CONFIG, tmp_path, 2) == pytest.approx(second, abs=1e-14)


def test_a_failed_round_leaves_no_moments(tmp_path: Path) -> None:
    """Round 2 has one reply of the two it needs: round 3 is then as round 2 but for Flower's count of rounds.

    Round 3's length is 0.15 · √(1 − 0.75⁴)/(1 − 0.5⁴), with the moments of round 2 above.
    """

    def fail_once(job: Job, partition: int, reply: Message) -> None:
        if (job.server_round, partition) == (2, 0):
            raise RuntimeError("nothing from here")

    first, second = (theta_after(METHOD, CONFIG, tmp_path, rounds) for rounds in (1, 2))
    found = theta_after(METHOD, replace(CONFIG, min_replies=2), tmp_path, 3, spoil=fail_once)
    longer = math.sqrt((1 - 0.75**4) / (1 - 0.75**3)) * (1 - 0.5**3) / (1 - 0.5**4)
    assert found == pytest.approx(first + longer * (second - first), abs=1e-14)


@pytest.mark.parametrize("how", BROKEN)
def test_broken_replies_are_left_out(how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_left_out(METHOD, CONFIG, tmp_path, broken_arrays(how), BROKEN[how], caplog)


def test_it_learns(tmp_path: Path) -> None:
    check_learns(tmp_path, {"algorithm": "fedadam", "learning-rate": 0.3, "adam-eta": 0.02})
