"""FedPAC: its numbers, what it comes down to without its two parts, what it leaves out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Message
from safetensors.torch import load_file
from torch import nn

import client_app
import server_app
from fedpm_flwr import messages
from fedpm_flwr.config import Config
from fedpm_flwr.curvature import Block, Dense, Diagonal, LayerCurvature
from fedpm_flwr.inline import run_inline
from fedpm_flwr.method import Job
from fedpm_flwr.rivals.fedpac import METHOD, MeanPreconditioner, correct_updates

from ..jobs import Spoil, untouched
from .quadratic import BROKEN, broken_arrays, rows, theta_after

CONFIG = Config(
    algorithm="fedpac",
    fedpac_beta=0.5,
    learning_rate=1.0,
    damping=1.0,
    ema=0.5,
    local_steps=1,
    refresh_interval=1,
    inverse_interval=1,
    codec="triangle-float64",
    dtype="float64",
    fraction_train=1.0,
    min_available_nodes=2,
)
DATA = rows([[1.0]], [3.0]), rows([[2.0]], [10.0])
TWO_ROUNDS = 9165 / 2992


def after(rounds: int, folder: Path, config: Config = CONFIG, spoil: Spoil = untouched) -> float:
    """w after so many rounds of ``DATA``."""
    return theta_after(METHOD, config, folder, rounds, data=DATA.__getitem__, spoil=spoil)


def test_two_rounds(tmp_path: Path) -> None:
    """f₁ = ½(w − 3)², A₁ = 1;  f₂ = ½(2w − 10)², A₂ = 4;  g = A (w − c), c = 3 and 5; η = λ = 1, β = ema = ½.

    Round 1, w = 0, no shared A, Δ = 0:
        w₁ = ½ · 3/(1 + 1) = 3/4,  w₂ = ½ · 20/(4 + 1) = 2;  w = 11/8, s = 11/8, A = 5/2.
    Round 2: A₁ = ½ · 5/2 + ½ · 1 = 7/4,  A₂ = ½ · 5/2 + ½ · 4 = 13/4.
        g₁ = 11/8 − 3 = −13/8,    w₁ = 11/8 + ½ · (13/8)/(11/4) + ½ · 11/8 = 11/8 + 13/44 + 11/16 = 415/176
        g₂ = 4(11/8 − 5) = −29/2, w₂ = 11/8 + ½ · (29/2)/(17/4) + ½ · 11/8 = 11/8 + 29/17 + 11/16 = 1025/272
        w = (415/176 + 1025/272) / 2 = 9165/2992.
    """
    assert after(1, tmp_path) == pytest.approx(11 / 8, rel=1e-14)
    assert after(2, tmp_path) == pytest.approx(TWO_ROUNDS, rel=1e-14)


def test_clients_count_by_their_examples(tmp_path: Path) -> None:
    """As above, with client 2's example three times: w = ¼ · 3/4 + ¾ · 2 = 27/16 after round 1, A = 13/4.

    Round 2: A₁ = ½ · 13/4 + ½ = 17/8, w₁ = 27/16 + ½ (21/16)/(25/8) + 27/32 = 27/16 + 21/100 + 27/32;
    A₂ = ½ · 13/4 + 2 = 29/8, w₂ = 27/16 + ½ (53/4)/(37/8) + 27/32 = 27/16 + 53/37 + 27/32.
    """
    data = (DATA[0], rows([[2.0]], [10.0], times=3)).__getitem__
    expected = 81 / 32 + (21 / 100 + 3 * 53 / 37) / 4
    assert theta_after(METHOD, CONFIG, tmp_path, data=data) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("how", [*BROKEN, "damaged curvature"])
def test_bad_replies_are_left_out(how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Round 1 without client 1 ends at w₂ = 2."""

    def damaged(job: Job, partition: int, reply: Message) -> None:
        if (job.server_round, partition) == (1, 0):
            reply.content[messages.CURVATURE] = ConfigRecord({messages.PAYLOAD: b"x" * 40})

    spoil = broken_arrays(how, (1, 0)) if how in BROKEN else damaged
    assert after(1, tmp_path, spoil=spoil) == pytest.approx(2.0, rel=1e-14)
    assert caplog.text.count("left out the reply") == 1


@pytest.mark.parametrize("bad", [{(2, 0)}, {(2, 0), (2, 1)}], ids=["some replies", "none"])
def test_a_failed_round_leaves_the_shared_direction_and_curvature(
    bad: set[tuple[int, int]], tmp_path: Path
) -> None:
    """Round 2 has fewer than min-replies: round 3 is what round 2 would have been."""
    config = Config(**{**vars(CONFIG), "min_replies": 2})
    assert after(3, tmp_path, config, broken_arrays("nan", *bad)) == pytest.approx(TWO_ROUNDS, rel=1e-14)


def test_a_round_without_curvature_leaves_the_shared_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Round 2 without curvature is as ever; round 3 starts from the A = 5/2 of round 1, with s = w − 11/8."""

    def dropped(job: Job, partition: int, reply: Message) -> None:
        if job.server_round == 2:
            del reply.content[messages.CURVATURE]

    w, s = TWO_ROUNDS, TWO_ROUNDS - 11 / 8
    expected = w + s / 2 - ((w - 3) / (11 / 4) + 4 * (w - 5) / (17 / 4)) / 4
    assert after(3, tmp_path, spoil=dropped) == pytest.approx(expected, rel=1e-14)
    assert caplog.text.count("round 2: no reply held curvature; the last mean stays") == 1


def test_k_corrections_move_by_beta_times_the_last_step() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    correct_updates(optimizer, model, {"weight": torch.tensor([[4.0]], dtype=torch.float64)}, 0.25, 5)
    for _ in range(5):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    assert float(model.weight.detach()) == pytest.approx(1.0 + 0.25 * 4.0 - 5 * 0.75 * 0.1, rel=1e-14)


def test_the_mean_is_by_parts_and_of_the_kind_of_most_weight() -> None:
    block = Block("a", ("a", "b"))
    diagonals = [LayerCurvature(block, Diagonal(torch.tensor([[float(i), 2.0]])), float(i)) for i in (1, 5)]
    mean = MeanPreconditioner()
    mean.add([diagonals[0]], 3.0)
    mean.add([LayerCurvature(Block("b", ("b",)), Dense(torch.eye(2)), 0.0)], 3.5)
    mean.add([diagonals[1]], 1.0)
    (layer,) = mean.result()
    assert mean.forms == 2
    assert (layer.block, layer.damping) == (block, 2.0)
    assert torch.equal(layer.curvature.parts()["values"], torch.tensor([[2.0, 2.0]]))


def run(folder: Path, nodes: int = 4, **changes: Any) -> list[dict[str, float]]:
    settings = {"num-server-rounds": 3, "alpha": 10.0, "output": str(folder), **changes}
    run_inline(server_app.app, client_app.app, nodes, Config.from_run_config(settings).to_run_config())
    rows: list[dict[str, float]] = json.loads((folder / "metrics.json").read_text())
    return rows


@pytest.mark.parametrize("steps", [1, 3])
def test_without_its_two_parts_it_is_localnewton_to_the_bit(steps: int, tmp_path: Path) -> None:
    shared: dict[str, Any] = {"max-train-examples": 120, "local-steps": steps}
    off: dict[str, Any] = {"algorithm": "fedpac", "fedpac-beta": 0.0, "fedpac-align": False}
    run(tmp_path / "a", 3, **shared, algorithm="localnewton")
    run(tmp_path / "b", 3, **shared, **off)
    run(tmp_path / "c", 3, **shared, **{**off, "fedpac-align": True})
    first, second, third = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], third[key]) for key in first)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_it_learns(fraction: float, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"fraction-train": fraction, "learning-rate": 0.2}
    rows = run(tmp_path, algorithm="fedpac", **settings)
    assert [row["clients"] for row in rows[1:]] == [4 * fraction] * 3
    assert rows[-1]["test-loss"] < rows[0]["test-loss"] - 0.3


@pytest.mark.parametrize("optimizer", ["kfac", "sophia", "ltda"])
def test_other_optimizers_are_aligned_too(optimizer: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "optimizer": optimizer,
        "learning-rate": 0.01,
        "max-train-examples": 120,
        "local-steps": 2,
    }
    rows = run(tmp_path, 2, algorithm="fedpac", damping=1.0, **settings)
    assert rows[-1]["clients"] == 2
    assert rows[-1]["test-loss"] < 2.4
