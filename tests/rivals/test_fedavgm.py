"""FedAvgM: Flower's momentum on the server, guarded."""

from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import Message

from fedpm_flwr.config import Config
from fedpm_flwr.method import Job
from fedpm_flwr.rivals import fedavg
from fedpm_flwr.rivals.fedavgm import METHOD

from .application import check_learns
from .quadratic import BROKEN, broken_arrays, check_left_out, theta_after

CONFIG = Config(learning_rate=0.1, local_steps=1, server_momentum=0.5, server_learning_rate=2.0)


def test_two_rounds_by_hand(tmp_path: Path) -> None:
    """η = 0.1, K = 1, μ_s = 0.5, η_s = 2.

    Round 1, θ = 0: θ₀ = 0.1, θ₁ = −0.4; mean 0.1/4 − 3·0.4/4 = −0.275; v = 0.275; θ = −0.55.
    Round 2: g₀ = −1.55, θ₀ = −0.395; g₁ = 1.8, θ₁ = −0.73; mean −0.64625, so θ − mean = 0.09625;
    v = 0.5·0.275 + 0.09625 = 0.23375; θ = −0.55 − 2·0.23375 = −1.0175.
    """
    assert theta_after(METHOD, CONFIG, tmp_path, 1) == pytest.approx(-0.55, abs=1e-14)
    assert theta_after(METHOD, CONFIG, tmp_path, 2) == pytest.approx(-1.0175, abs=1e-14)


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_without_momentum_and_with_steps_of_one_it_is_fedavg(rounds: int, tmp_path: Path) -> None:
    plain = replace(CONFIG, server_momentum=0.0, server_learning_rate=1.0)
    assert theta_after(METHOD, plain, tmp_path, rounds) == theta_after(fedavg.METHOD, plain, tmp_path, rounds)


def test_the_limit_of_no_momentum_is_fedavg(tmp_path: Path) -> None:
    """Flower leaves out its own step where μ_s is 0 and η_s is 1: here it takes it."""
    nearly = replace(CONFIG, server_momentum=1e-15, server_learning_rate=1.0)
    expected = theta_after(fedavg.METHOD, nearly, tmp_path, 3)
    assert theta_after(METHOD, nearly, tmp_path, 3) == pytest.approx(expected, abs=1e-13)


def test_a_failed_round_leaves_no_momentum(tmp_path: Path) -> None:
    """Round 2 has one reply of the two it needs: rounds 1 and 3 are then as rounds 1 and 2 without it."""

    def fail_once(job: Job, partition: int, reply: Message) -> None:
        if (job.server_round, partition) == (2, 0):
            raise RuntimeError("nothing from here")

    found = theta_after(METHOD, replace(CONFIG, min_replies=2), tmp_path, 3, spoil=fail_once)
    assert found == theta_after(METHOD, CONFIG, tmp_path, 2)


@pytest.mark.parametrize("how", BROKEN)
def test_broken_replies_are_left_out(how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_left_out(METHOD, CONFIG, tmp_path, broken_arrays(how), BROKEN[how], caplog)


def test_it_learns(tmp_path: Path) -> None:
    check_learns(tmp_path, {"algorithm": "fedavgm", "learning-rate": 0.2, "server-momentum": 0.5})
