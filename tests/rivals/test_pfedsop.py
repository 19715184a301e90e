"""pFedSOP: its numbers, its Newton step, what clients keep, what it leaves out."""

import csv
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from flwr.app import Message

import client_app
import server_app
from fedpm_flwr import messages
from fedpm_flwr.config import Config
from fedpm_flwr.inline import run_inline
from fedpm_flwr.method import Job
from fedpm_flwr.rivals.pfedsop import METHOD, collaboration, rank_one_newton

from ..apps import federate, half_squared_error
from ..jobs import Examples, Spoil, app_of, untouched
from .quadratic import BROKEN, broken_arrays, make_linear, rows, scalar, theta_after

CONFIG = Config(
    algorithm="pfedsop",
    learning_rate=0.5,
    personal_learning_rate=5.0,
    damping=4.0,
    local_steps=1,
    dtype="float64",
    min_available_nodes=2,
)
START = 4.0


def equal(partition: int) -> Examples:
    return rows([[1.0]], [0.0])


def after(rounds: int, folder: Path, config: Config = CONFIG, spoil: Spoil = untouched) -> float:
    """θ after so many rounds of equal clients."""
    return theta_after(METHOD, config, folder, rounds, start=START, data=equal, spoil=spoil)


def test_two_rounds_of_equal_clients(tmp_path: Path) -> None:
    """f = ½w², g = w, η = ½, K = 1, ρ = 4, η₁ = 5, θ = 4; Δᵢ = Δ, so that v = Δ whatever b.

    Round 1: x = 4, y = 2, Δ = (4 − 2)/½ = 4, θ = 4 − ½ · 4 = 2.
    Round 2: x = 4 − 5 · 4/(4 + 16) = 3, y = 3/2, Δ = 3, θ = 2 − ½ · 3 = ½.
    """
    assert after(1, tmp_path) == pytest.approx(2.0, rel=1e-14)
    assert after(2, tmp_path) == pytest.approx(0.5, rel=1e-14)


def test_the_server_takes_longer_steps(tmp_path: Path) -> None:
    """As above with η_s = ½: θ = 4 − ½ · ½ · 4 = 3, then 3 − ½ · ½ · 3 = 9/4: Δ is told without η_s."""
    config = Config(**{**vars(CONFIG), "server_learning_rate": 0.5})
    assert after(2, tmp_path, config) == pytest.approx(2.25, rel=1e-14)


def test_two_rounds_of_clients_that_differ(tmp_path: Path) -> None:
    """f₁ = ½(w − 4)², f₂ = ½(w + 2)², η = ½, K = 1, ρ = η₁ = λ_G = 1, θ = 0.

    Round 1: Δ₁ = −4, Δ₂ = 2, Δ = −1, θ = ½.
    Round 2: φ₁ = 0, b₁ = 1 − exp(−e) = 0.934012, v₁ = −4 + 3 b₁ = −1.197964, x₁ = 1.197964/2.435118 = 0.491953;
             φ₂ = π, b₂ = 1 − exp(−exp(1 − π)) = 0.110831, v₂ = 2 − 3 b₂ = 1.667507, x₂ = −1.667507/3.780580
             = −0.441072;  Δ₁ = x₁ − 4, Δ₂ = x₂ + 2, Δ = (x₁ + x₂ − 2)/2 = −0.974559, θ = ½ + 0.487280 = 0.987280.
    """
    config = Config(**{**vars(CONFIG), "damping": 1.0, "personal_learning_rate": 1.0, "personal_sharpness": 1.0})
    data = (rows([[1.0]], [4.0]), rows([[1.0]], [-2.0])).__getitem__
    assert theta_after(METHOD, config, tmp_path, 1, data=data) == pytest.approx(0.5, rel=1e-14)
    assert theta_after(METHOD, config, tmp_path, 2, data=data) == pytest.approx(0.987280, abs=2e-6)


@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
def test_the_newton_step_is_that_of_the_dense_matrix(damping: float) -> None:
    v = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    dense = torch.linalg.inv(torch.outer(v, v) + damping * torch.eye(7).double()) @ v
    assert torch.allclose(rank_one_newton(v, damping), dense, rtol=1e-9, atol=0)
    assert not rank_one_newton(torch.zeros(3), 0.0).any()


def test_collaboration_falls_with_the_angle() -> None:
    """1 radian: 1 − 1/e, whatever the sharpness; a zero update is at π/2 to all."""
    own, at = torch.tensor([[2.0, 0.0], [math.cos(1), math.sin(1)]], dtype=torch.float64)
    assert collaboration(own, at, 3.0) == pytest.approx(1 - 1 / math.e, rel=1e-12)
    near, far = collaboration(own, own, 3.0), collaboration(own, -own, 3.0)
    assert 1 >= near > 0.99 > 0.01 > far > 0
    assert collaboration(own, 0 * own, 2.0) == pytest.approx(1 - math.exp(-math.exp(2 - math.pi)))


def test_a_client_whose_state_is_lost_starts_from_the_global_model(tmp_path: Path) -> None:
    """Equal clients as above; in round 2 x = θ = 2, without a Newton step: y = 1, θ = 2 − 1 = 1."""

    def lose(job: Job, partition: int, reply: Message) -> None:
        if partition == 1 or job.server_round == 1:
            shutil.rmtree(tmp_path, ignore_errors=True)

    assert after(2, tmp_path, spoil=lose) == pytest.approx(1.0, rel=1e-14)


@pytest.mark.parametrize("how", BROKEN)
def test_bad_replies_are_left_out(how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert after(2, tmp_path, spoil=broken_arrays(how, (1, 0))) == pytest.approx(0.5, rel=1e-14)
    assert caplog.text.count("left out the reply") == 1


def test_a_client_that_diverges_keeps_what_it_had(tmp_path: Path) -> None:
    """In round 2 partition 0 has an endless target: its reply says so, and its state is that of round 1."""
    data, diverged = [equal(0), equal(1)], []

    def note(job: Job, partition: int, reply: Message) -> None:
        (metrics,) = reply.content.metric_records.values()
        diverged.append((job.server_round, partition, bool(metrics.get(messages.DIVERGED))))
        if len(diverged) == 2:
            data[0] = rows([[1.0]], [math.inf])

    found = theta_after(METHOD, CONFIG, tmp_path, start=START, data=lambda i: data[i], spoil=note)
    assert found == pytest.approx(0.5, rel=1e-14)
    assert sorted(diverged) == [(1, 0, False), (1, 1, False), (2, 0, True), (2, 1, False)]
    states = sorted(str(path.relative_to(tmp_path)).split("/", 1)[1] for path in tmp_path.rglob("*.safetensors"))
    assert states == [
        "partition-0/1.safetensors",
        "partition-1/1.safetensors",
        "partition-1/2.safetensors",
    ]


def test_the_personal_models_are_evaluated(tmp_path: Path) -> None:
    """Equal clients: after round 1 x = 4, after round 2 x = 3, and their loss ½x² is told."""
    config = Config(**{**vars(CONFIG), "fraction_evaluate": 1.0})
    app = app_of(METHOD, config, tmp_path, data=equal, make_model=scalar, loss=half_squared_error)
    result = federate(app, METHOD.strategy(config), make_linear(START)(), 2, rounds=2)
    told = [result.evaluate_metrics_clientapp[number]["personal-loss"] for number in (1, 2)]
    trained = [result.train_metrics_clientapp[number]["personal-loss"] for number in (1, 2)]
    assert told == trained == [8.0, 4.5]


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_it_learns_and_reports_both_models(fraction: float, tmp_path: Path) -> None:
    settings = {
        "algorithm": "pfedsop",
        "num-server-rounds": 3,
        "alpha": 10.0,
        "learning-rate": 0.3,
        "damping": 10.0,
        "personal-learning-rate": 3.0,
        "fraction-train": fraction,
        "fraction-evaluate": 1.0,
        "state-folder": str(tmp_path / "state"),
        "output": str(tmp_path / "run"),
    }
    run_inline(server_app.app, client_app.app, 4, Config.from_run_config(settings).to_run_config())
    rows = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert rows[-1]["test-loss"] < rows[0]["test-loss"] - 0.05
    with (tmp_path / "run" / "metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    for name in ("client-accuracy", "personal-accuracy"):
        worst, median, best = (float(last[f"{name}-{which}"]) for which in ("worst", "median", "best"))
        assert 0 <= worst <= median <= best <= 1
        assert worst <= float(last[name]) <= best
    assert last["personal-loss"] != last["client-loss"]
