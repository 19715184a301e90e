"""FedProx: local steps held near θ, with μ_p as Flower's strategy sends it."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from fedpm_flwr.config import Config
from fedpm_flwr.rivals import fedavg
from fedpm_flwr.rivals.fedprox import METHOD

from .application import check_learns, digits
from .quadratic import BROKEN, broken_arrays, check_left_out, theta_after

CONFIG = Config(learning_rate=0.1, local_steps=2, proximal_mu=1.0)


def test_two_rounds_by_hand(tmp_path: Path) -> None:
    """η = 0.1, K = 2, μ_p = 1.

    Round 1, θ = 0. θ₀: 0 + 0.1·1 = 0.1, then −0.9 + 0.1 = −0.8 gives 0.18. θ₁: −0.4, then
    4·0.6 − 0.4 = 2 gives −0.6. Mean: 0.18/4 − 3·0.6/4 = −0.405.
    Round 2, θ = −0.405. θ₀: −1.405 gives −0.2645, then −1.2645 + 0.1405 = −1.124 gives −0.1521.
    θ₁: 2.38 gives −0.643, then 1.428 − 0.238 = 1.19 gives −0.762. Mean: −0.038025 − 0.5715 = −0.609525.
    """
    assert theta_after(METHOD, CONFIG, tmp_path, 1) == pytest.approx(-0.405, abs=1e-14)
    assert theta_after(METHOD, CONFIG, tmp_path, 2) == pytest.approx(-0.609525, abs=1e-14)


def test_without_the_term_it_is_fedavg_bit_for_bit(tmp_path: Path) -> None:
    """Of the cnn in float32, over three rounds."""
    shared = {"model": "cnn", "learning-rate": 0.3, "momentum": 0.5, "max-train-examples": 200}
    plain = digits(tmp_path / "a", {**shared, "algorithm": "fedavg"})
    without, with_term = (
        digits(tmp_path / name, {**shared, "algorithm": "fedprox", "proximal-mu": mu})
        for name, mu in (("b", 0.0), ("c", 1.0))
    )
    losses = [[row["test-loss"] for row in rows] for rows in (plain, without, with_term)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert models[0] == models[1]


def test_the_stronger_the_term_the_nearer_to_the_global_optimum(tmp_path: Path) -> None:
    """Rounds of many steps: FedAvg ends at ¼·1 − ¾·1 = −0.5, the mean of the clients' own optima.

    The optimum of ¼f₀ + ¾f₁ is where (θ − 1)/4 + 3(θ + 1) = 0: −11/13. A round of exact proximal
    minimisers, (θμ + 1)/(1 + μ) and (θμ − 4)/(4 + μ), ends where θ/4·1/(1 + μ) + 3θ/4·4/(4 + μ) =
    1/4/(1 + μ) − 3/(4 + μ): for μ = 4, θ(0.05 + 0.375) = 0.05 − 0.375.
    """
    many = replace(CONFIG, learning_rate=0.2, local_steps=30)
    assert theta_after(fedavg.METHOD, many, tmp_path, 3) == pytest.approx(-0.5, abs=1e-2)
    strong = theta_after(METHOD, replace(many, proximal_mu=4.0), tmp_path, 20)
    assert strong == pytest.approx((0.05 - 0.375) / (0.05 + 0.375), abs=1e-4)
    assert math.dist([strong], [-11 / 13]) < math.dist([-0.5], [-11 / 13])


def test_the_clients_step_by_the_weight_that_the_server_sends(tmp_path: Path) -> None:
    """A stock strategy that sends none gets FedAvg's steps."""
    found = theta_after(replace(METHOD, strategy=fedavg.METHOD.strategy), CONFIG, tmp_path)
    assert found == theta_after(fedavg.METHOD, CONFIG, tmp_path)


@pytest.mark.parametrize("how", BROKEN)
def test_broken_replies_are_left_out(how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_left_out(METHOD, CONFIG, tmp_path, broken_arrays(how), BROKEN[how], caplog)


def test_it_learns(tmp_path: Path) -> None:
    check_learns(tmp_path, {"algorithm": "fedprox", "learning-rate": 0.3})
