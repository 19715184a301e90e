"""FedNS: its rounds by hand, the exact step that it is without a sketch, and the sketches."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flwr.app import Message
from torch import Tensor, nn

from fedpm_flwr.guarded import FailedRoundsError
from fedpm_flwr.method import Job
from fedpm_flwr.objective import Objective
from fedpm_flwr.rivals.fedns import gauss_newton_root
from fedpm_flwr.rivals.sketches import SKETCHES
from fedpm_flwr.tasks.models import Logistic

from ..test_application import run as run_application
from .quadratic import Problem, make_linear, make_softmax, softmax_data, softmax_loss, with_tensors


def one_dimension(partition: int) -> tuple[Tensor, Tensor]:
    """A: x = 1, y = 1, twice; B: x = 2, y = −1, once."""
    x, y = (([[1], [1]], [[1], [1]]), ([[2]], [[-1]]))[partition]
    return torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)


def test_rounds_on_a_quadratic_by_hand(tmp_path: Path) -> None:
    """fA = ½(θ − 1)² + ω/2 θ², twice, fB = ½(2θ + 1)² + ω/2 θ²; w = ⅔, ⅓; ω = 1, λ = 1, η_s = 1.

    AA = (1, 1)ᵀ/√2, AB = (2): H = ⅔ · 1 + ⅓ · 4 + ω + λ = 4, and ∇f = ⅔(θ − 1) + ⅓(4θ + 2) + ωθ = 3θ.
    From θ = 4: 4 − 12/4 = 1;  1 − 3/4 = ¼.
    """
    problem = Problem(tmp_path, one_dimension, make_linear(4.0))
    problem.run(problem.config("fedns", weight_decay=1.0, damping=1.0), rounds=2)
    assert torch.allclose(torch.cat(problem.thetas), torch.tensor([4, 1, 0.25]).double(), rtol=1e-12)


def test_whole_roots_give_newtons_steps_of_the_global_loss(tmp_path: Path) -> None:
    """For softmax regression the Gauss-Newton matrix is the Hessian."""
    problem = Problem(tmp_path, softmax_data, make_softmax, F.cross_entropy, nodes=3)
    problem.run(problem.config("fedns", weight_decay=0.01, damping=0.0, server_learning_rate=0.7), rounds=3)
    gradient = torch.func.grad(lambda theta: softmax_loss(theta, 0.01))
    hessian = torch.func.hessian(lambda theta: softmax_loss(theta, 0.01))
    for old, new in zip(problem.thetas, problem.thetas[1:], strict=False):
        assert torch.allclose(new, old - 0.7 * torch.linalg.solve(hessian(old), gradient(old)), rtol=1e-9)


@pytest.mark.parametrize("sketch", SKETCHES)
def test_with_sketches_it_converges_to_the_same_optimum(sketch: str, tmp_path: Path) -> None:
    problem = Problem(tmp_path, softmax_data, make_softmax, F.cross_entropy, nodes=3)
    config = problem.config("fedns", weight_decay=0.05, damping=0.05, sketch=sketch, sketch_size=20)
    problem.run(config, rounds=12)
    slopes = [float(torch.func.grad(lambda t: softmax_loss(t, 0.05))(theta).norm()) for theta in problem.thetas]
    assert slopes[-1] < 1e-3 * slopes[0]
    again = problem.thetas
    problem.run(config, rounds=2)
    assert torch.allclose(
        torch.stack(again[:3]), torch.stack(problem.thetas), rtol=1e-12
    )  # drawn by the run's seed


def mlp() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))


@pytest.mark.parametrize("make", [make_softmax, mlp])
def test_the_roots_gram_matrix_is_the_gauss_newton_matrix(make: Callable[[], nn.Module]) -> None:
    x, y = softmax_data(1)
    model, batches = make().double(), [(x[:30], y[:30]), (x[30:], y[30:])]
    root = gauss_newton_root(model, batches, F.cross_entropy, "cpu")
    assert root.shape[0] == 2 * len(x)  # three classes, of which one direction is flat
    expected = Objective(model, batches, F.cross_entropy).hessian("ggn")
    assert torch.allclose(root.T @ root, expected, rtol=1e-10, atol=1e-12)


def test_for_logistic_regression_a_root_has_a_row_for_each_example_as_in_the_source() -> None:
    x = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = Logistic(3).double()
    model.theta.weight.data = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64)
    root = gauss_newton_root(model, [(x, torch.arange(7) % 2)], F.cross_entropy, "cpu")
    p = torch.sigmoid(model.theta(x))
    expected = (p * (1 - p)).sqrt() * x / math.sqrt(7)
    assert torch.allclose(root.abs(), expected.abs(), rtol=1e-10)


@pytest.mark.parametrize("sketch", SKETCHES)
def test_sketches_keep_gram_matrices_on_average(sketch: str) -> None:
    matrix = torch.randn(11, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    generator, draws = torch.Generator().manual_seed(1), 1000
    mean, unlike = torch.zeros(3, 3).double(), 0.0
    for _ in range(draws):
        short = SKETCHES[sketch](matrix, 4, generator)
        assert short.shape == (4, 3)
        mean += short.T @ short / draws
        unlike = max(unlike, float((short.T @ short - matrix.T @ matrix).abs().max()))
    assert float((mean - matrix.T @ matrix).norm() / (matrix.T @ matrix).norm()) < 0.06
    assert unlike > 1


def test_all_rows_of_a_hadamard_sketch_lose_nothing() -> None:
    matrix = torch.randn(11, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = SKETCHES["hadamard"](matrix, 16, torch.Generator().manual_seed(1))
    assert torch.allclose(whole.T @ whole, matrix.T @ matrix, rtol=1e-12)


BAD: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "no tensors": (lambda sent: {}, "it holds no 'extra' tensors"),
    "no sketch": (lambda sent: {"gradient": sent["gradient"]}, "missing or extra: root"),
    "another shape": (lambda sent: sent | {"root": torch.zeros(5, 3)}, r"'root' is \[5, 3\], not \[5, 15\]"),
    "a number": (lambda sent: sent | {"root": torch.zeros(())}, r"'root' is \[\], not \[0, 15\]"),
    "not finite": (lambda sent: sent | {"root": sent["root"] * torch.inf}, "'root' is not finite"),
    "too long": (lambda sent: sent | {"root": torch.zeros(31, 15)}, "31 rows, more than sketch-size=30"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_reply_is_left_out_and_the_round_goes_on(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change, reason = BAD[case]

    def spoil(job: Job, partition: int, reply: Message) -> Message | None:
        bad = (job.server_round, partition) == (2, 1)
        return with_tensors(reply, change) if bad else None

    problem = Problem(tmp_path, softmax_data, make_softmax, F.cross_entropy, nodes=3)
    problem.run(problem.config("fedns", weight_decay=0.1, sketch_size=30), rounds=3, spoil=spoil)
    assert caplog.text.count("left out the reply") == 1
    assert re.search(rf"round 2: left out .*\(partition 1\): .*{reason}", caplog.text)
    assert not torch.equal(problem.thetas[2], problem.thetas[1])


def test_a_singular_sum_fails_the_round_and_names_the_cause(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    problem = Problem(tmp_path, softmax_data, make_softmax, F.cross_entropy, nodes=3)
    with pytest.raises(FailedRoundsError, match="no round gave a new model"):
        problem.run(problem.config("fedns", damping=0.0, sketch_size=2), rounds=1)
    assert "CurvatureError: a matrix of side 15 is not positive definite: the model stays as it was" in caplog.text


def test_a_model_with_too_many_parameters_ends_the_run_at_once(tmp_path: Path) -> None:
    problem = Problem(tmp_path, softmax_data, make_softmax, F.cross_entropy, nodes=3)
    with pytest.raises(ValueError, match="matrices of all 15 parameters, more than max-factor-side=14"):
        problem.run(problem.config("fedns", max_factor_side=14), rounds=1)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_it_learns_digits_through_the_application(fraction: float, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "algorithm": "fedns", "model": "linear", "weight-decay": 0.01, "damping": 0.01, "alpha": 10.0,
        "fraction-train": fraction, "num-server-rounds": 3, "batch-size": 0,
    }  # fmt: skip
    rows = run_application(tmp_path, settings, nodes=4)
    losses = [row["test-loss"] for row in rows]
    assert [row["clients"] for row in rows[1:]] == [4 * fraction] * 3
    assert losses[1] < losses[0]
    assert losses[-1] < losses[0] - 0.5
