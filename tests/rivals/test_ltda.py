"""LTDA's local steps, averaged."""

from dataclasses import replace
from pathlib import Path

import pytest

from fedpm_flwr.algorithms import settings_without_effect
from fedpm_flwr.config import Config
from fedpm_flwr.rivals import localnewton
from fedpm_flwr.rivals.ltda import METHOD

from .application import check_learns
from .quadratic import BROKEN, broken_arrays, check_left_out, theta_after

CONFIG = Config(learning_rate=0.5, local_steps=1, damping=1.0)


def test_two_rounds_by_hand(tmp_path: Path) -> None:
    """η = 0.5, λ = 1, K = 1. In one dimension v²/v₀ is the second derivative: 1 and 4.

    Round 1, θ = 0: θ₀ = 0.5·1/2 = 0.25, θ₁ = −0.5·4/5 = −0.4; mean 0.0625 − 0.3 = −0.2375.
    Round 2: θ₀ = −0.2375 + 0.5·1.2375/2 = 0.071875; θ₁ = −0.2375 − 0.5·3.05/5 = −0.5425;
    mean 0.01796875 − 0.406875 = −0.38890625.
    """
    assert theta_after(METHOD, CONFIG, tmp_path, 1) == pytest.approx(-0.2375, abs=1e-14)
    assert theta_after(METHOD, CONFIG, tmp_path, 2) == pytest.approx(-0.38890625, abs=1e-14)


@pytest.mark.parametrize("optimizer", ["foof", "kfac"])
def test_the_setting_optimizer_has_no_effect(optimizer: str, tmp_path: Path) -> None:
    named = theta_after(localnewton.METHOD, replace(CONFIG, optimizer="ltda"), tmp_path)
    assert theta_after(METHOD, replace(CONFIG, optimizer=optimizer), tmp_path) == named


def test_settings_without_effect_are_told() -> None:
    config = Config(algorithm="ltda", optimizer="kfac", damping=2.0, fisher="exact", server_momentum=0.5)
    told = [line.split("=")[0] for line in settings_without_effect(config)]
    assert sorted(told) == ["fisher", "optimizer", "server-momentum"]


@pytest.mark.parametrize("how", BROKEN)
def test_broken_replies_are_left_out(how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_left_out(METHOD, CONFIG, tmp_path, broken_arrays(how), BROKEN[how], caplog)


def test_it_learns(tmp_path: Path) -> None:
    check_learns(tmp_path, {"algorithm": "ltda", "learning-rate": 0.3, "damping": 1.0})
