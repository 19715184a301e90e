"""FedNL: its rounds by hand, its reductions, and both sides' agreement on every client's Hessian estimate."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flwr.app import Message
from torch import Tensor

from fedpm_flwr.method import Job
from fedpm_flwr.replies import read_tensors
from fedpm_flwr.rivals.compressors import COMPRESSORS
from fedpm_flwr.rivals.fednl import FedNL

from ..test_application import run as run_application
from .quadratic import Problem, make_linear, make_softmax, softmax_data, softmax_loss, with_tensors


def matrix(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def one_dimension(partition: int) -> tuple[Tensor, Tensor]:
    """A: x = 1, y = 1, twice; B: x = 2, y = −1, once."""
    return (matrix([1], [1]), matrix([1], [1])) if partition == 0 else (matrix([2]), matrix([-1]))


def two_dimensions(partition: int) -> tuple[Tensor, Tensor]:
    """A: x = (2, 0), twice; B: x = (2, 0) and (0, 4); y = 0."""
    inputs = (matrix([2, 0], [2, 0]), matrix([2, 0], [0, 4]))[partition]
    return inputs, torch.zeros(2, 1, dtype=torch.float64)


def quadratic_data(partition: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(partition)
    x = torch.randn(6 + 5 * partition, 4, dtype=torch.float64, generator=generator) * (partition + 1)
    return x, torch.randn(len(x), 1, dtype=torch.float64, generator=generator)


ZERO: dict[str, Any] = {"initial_hessian": "zero", "compressor": "identity"}


@pytest.mark.parametrize(
    ("settings", "thetas"),
    [
        ({"fednl_option": 1, "hessian_floor": 0.5, "server_learning_rate": 0.125}, [4, 2, 1.5, 1.25]),
        ({"fednl_option": 2, "server_learning_rate": 0.5}, [4, 2, 1, 0.5]),
    ],
)
def test_rounds_on_a_quadratic_by_hand(settings: dict[str, Any], thetas: list[float], tmp_path: Path) -> None:
    """fA = ½(θ − 1)², twice, fB = ½(2θ + 1)²: hA = 1, hB = 4.

    With w = ⅔, ⅓, h = 2 and ∇f = ⅔(θ − 1) + ⅓(4θ + 2) = 2θ.

    From Hᵢ = 0, α = ½ and no compression, H is 0, 1, 1½ before rounds 1, 2, 3, since each halves 2 − H.
    From θ = 4:

    Option 1, μ = ½, η_s = ⅛: [0]_½ = ½: θ = 4 − ⅛ · 8 / ½ = 2;  2 − ⅛ · 4 / 1 = 1½;  1½ − ⅛ · 3 / 1½ = 1¼.
    Option 2, η_s = ½: l = ⅔|1 − HA| + ⅓|4 − HB| = 2 − H is 2, 1, ½, so that H + l = 2 in all three:
    θ = 4 − ½ · 8 / 2 = 2;  2 − ½ · 4 / 2 = 1;  1 − ½ · 2 / 2 = ½.
    """
    problem = Problem(tmp_path, one_dimension, make_linear(4.0))
    problem.run(problem.config("fednl", hessian_learning_rate=0.5, **ZERO, **settings), rounds=3)
    assert torch.allclose(torch.cat(problem.thetas), torch.tensor(thetas, dtype=torch.float64), rtol=1e-12)


@pytest.mark.parametrize("compressor", ["rank", "top"])
def test_what_is_left_out_is_learned_later_by_hand(compressor: str, tmp_path: Path) -> None:
    """HA = diag(4, 0), HB = diag(2, 8), w = ½, ½: ∇f = diag(3, 4) θ. α = 1, μ = 2, η_s = ¼.

    From Hᵢ = 0 and θ = (4, 4).
    One eigenpair, or one entry: C(DA) = diag(4, 0), C(DB) = diag(0, 8), and only then diag(2, 0).

    1. [0]_2 = 2I: θ = (4, 4) − ¼ (12, 16) / 2 = (2½, 2).                        H ← diag(2, 4)
    2. θ = (2½, 2) − ¼ (7½ / 2, 8 / 4) = (1.5625, 1.5).                          H ← diag(3, 4)
    3. θ = ¾ (1.5625, 1.5) = (1.171875, 1.125), as H is the Hessian now.
    """
    problem = Problem(tmp_path, two_dimensions, make_linear(4.0, 4.0))
    settings = ZERO | {"compressor": compressor, "hessian_floor": 2.0, "server_learning_rate": 0.25}
    problem.run(problem.config("fednl", **settings), rounds=3)
    expected = matrix([4, 4], [2.5, 2], [1.5625, 1.5], [1.171875, 1.125])
    assert torch.allclose(torch.stack(problem.thetas), expected, rtol=1e-12)


def test_a_round_from_exact_hessians_of_a_quadratic_is_fedpms_newton_step(tmp_path: Path) -> None:
    problem = Problem(tmp_path, quadratic_data, make_linear(1.0, -2.0, 0.5, 3.0), nodes=3)
    problem.run(problem.config("fednl", compressor="identity", weight_decay=0.1), rounds=1)
    ours = problem.thetas[-1]
    newton: dict[str, Any] = {"optimizer": "newton", "learning_rate": 1.0, "local_steps": 1, "damping": 0.0}
    problem.run(problem.config("fedpm", weight_decay=0.1, codec="triangle-float64", **newton), rounds=1)
    x, y = (torch.cat(parts) for parts in zip(*map(quadratic_data, range(3)), strict=True))
    optimum = torch.linalg.solve(x.T @ x / len(x) + 0.1 * torch.eye(4), x.T @ y / len(x))[:, 0]
    assert torch.allclose(ours, optimum, rtol=1e-10)
    assert torch.allclose(ours, problem.thetas[-1], rtol=1e-10)


def test_without_compression_it_is_newton_by_the_hessian_of_the_round_before(tmp_path: Path) -> None:
    problem = Problem(tmp_path, softmax_data, make_softmax, F.cross_entropy, nodes=3)
    problem.run(problem.config("fednl", compressor="identity", weight_decay=0.01), rounds=4)
    gradient = torch.func.grad(lambda theta: softmax_loss(theta, 0.01))
    hessian = torch.func.hessian(lambda theta: softmax_loss(theta, 0.01))
    theta, at = problem.thetas[0], problem.thetas[0]
    for found in problem.thetas[1:]:
        theta, at = theta - torch.linalg.solve(hessian(at), gradient(theta)), theta
        assert torch.allclose(found, theta, rtol=1e-9)


@pytest.mark.parametrize(
    ("option", "compressor", "size", "initial"),
    [(1, "rank", 1, "exact"), (2, "rank", 2, "zero"), (2, "top", 15, "exact")],
)
def test_it_converges_to_the_optimum(
    option: int, compressor: str, size: int, initial: str, tmp_path: Path
) -> None:
    problem = Problem(tmp_path, softmax_data, make_softmax, F.cross_entropy, nodes=3)
    config = problem.config(
        "fednl", fednl_option=option, compressor=compressor, compressor_size=size, initial_hessian=initial,
        hessian_floor=0.05, weight_decay=0.05,
    )  # fmt: skip
    problem.run(config, rounds=18)
    slopes = [float(torch.func.grad(lambda t: softmax_loss(t, 0.05))(theta).norm()) for theta in problem.thetas]
    assert slopes[-1] < 1e-3 * slopes[0]


def test_compressors() -> None:
    """Entries by hand, eigenpairs by their error; what travels has the shapes that are promised."""
    symmetric = matrix([3, 5, 0], [5, -6, 1], [0, 1, 2])
    restored = {}
    for name, size in (("identity", 1), ("rank", 1), ("rank", 9), ("top", 2), ("top", 99)):
        compressor = COMPRESSORS[name]
        sent = compressor.compress(symmetric, size)
        assert {key: tuple(part.shape) for key, part in sent.items()} == compressor.shapes(3, size)
        restored[name, size] = compressor.restore(sent, 3)
    for whole in (("identity", 1), ("rank", 9), ("top", 99)):
        assert torch.allclose(restored[whole], symmetric, atol=1e-12)
    assert torch.equal(restored["top", 2], matrix([0, 5, 0], [5, -6, 0], [0, 0, 0]))
    values = torch.linalg.eigvalsh(symmetric)
    left_out = torch.linalg.eigvalsh(symmetric - restored["rank", 1]).abs().max()
    assert values[0] < -values[-1]  # the largest magnitude is a negative eigenvalue's
    assert torch.isclose(left_out, values[1:].abs().max())
    assert COMPRESSORS["top"].compress(torch.eye(50), 1)["places"].dtype == torch.float32


class Watched:
    """Takes notes of who starts anew; deletes a client's state, or spoils its reply, in (round, partition)."""

    def __init__(self, forget: set[tuple[int, int]], lose: set[tuple[int, int]]) -> None:
        self.forget, self.lose = forget, lose
        self.started: list[tuple[int, int]] = []
        self.estimates: dict[int, Tensor] = {}

    def __call__(self, job: Job, partition: int, reply: Message) -> Message | None:
        sent = read_tensors(reply.content)
        if "start" in sent or not sent["base"].any():
            self.started.append((job.server_round, partition))
        if (job.server_round, partition) in self.lose:
            return with_tensors(reply, lambda sent: {})
        self.estimates[partition] = job.state.load(job.server_round)["hessian"]
        if (job.server_round, partition) in self.forget:
            shutil.rmtree(job.state._folder)
        return None


@pytest.mark.parametrize("initial", ["exact", "zero"])
@pytest.mark.parametrize(
    ("forget", "lose", "restarts"),
    [
        (set(), set(), []),
        ({(2, 1)}, set(), [(3, 1)]),
        (set(), {(3, 1)}, []),  # the client has the one that the server counts on as well
        (set(), {(2, 1), (3, 1), (4, 1)}, []),
        (set(), {(1, 1)}, [(2, 1)]),
    ],
)
def test_lost_states_and_lost_replies_leave_both_sides_agreed(
    initial: str,
    forget: set[tuple[int, int]],
    lose: set[tuple[int, int]],
    restarts: list[tuple[int, int]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    problem = Problem(tmp_path, softmax_data, make_softmax, F.cross_entropy, nodes=3)
    watched = Watched(forget, lose)
    config = problem.config("fednl", initial_hessian=initial, fednl_option=2, weight_decay=0.01, compressor_size=2)
    problem.run(config, rounds=5, spoil=watched)
    assert sorted(watched.started) == [(1, 0), (1, 1), (1, 2), *restarts]
    assert caplog.text.count("left out the reply") == len(lose)
    assert isinstance(problem.strategy, FedNL)
    for known in problem.strategy._known.values():
        partition = [len(softmax_data(i)[0]) for i in range(3)].index(int(known.weight))
        assert known.server_round == 5
        assert torch.allclose(known.hessian, watched.estimates[partition], rtol=1e-12, atol=1e-14)


def test_clients_that_do_not_take_part_count_by_what_they_sent_last(tmp_path: Path) -> None:
    """Where fA, fB and h are as in the first test: A alone takes part in the first round, B alone in the second.

    Exact starts, μ small, η_s = 1. Round 1: ∇fA = θ − 1 = 3, H = hA = 1: θ = 4 − 3 = 1.
    Round 2: ∇fB = 4θ + 2 = 6, H = ⅔ · 1 + ⅓ · 4 = 2: θ = 1 − 6 / 2 = −2.
    """

    def absent(job: Job, partition: int, reply: Message) -> Message | None:
        return with_tensors(reply, lambda sent: {}) if job.examples == job.server_round else None

    problem = Problem(tmp_path, one_dimension, make_linear(4.0))
    problem.run(problem.config("fednl", compressor="identity"), rounds=2, spoil=absent)
    assert torch.allclose(torch.cat(problem.thetas), torch.tensor([4.0, 1.0, -2.0]).double(), rtol=1e-12)


BAD = {
    "no tensors": (lambda sent: {}, "it holds no 'extra' tensors"),
    "no gradient": (lambda sent: {k: v for k, v in sent.items() if k != "gradient"}, "missing or extra: gradient"),
    "another shape": (lambda sent: sent | {"vectors": torch.zeros(3, 1)}, r"'vectors' is \[3, 1\], not \[15, 1\]"),
    "not finite": (lambda sent: sent | {"error": torch.tensor([torch.nan])}, "'error' is not finite"),
    "another base": (
        lambda sent: sent | {"base": torch.tensor([1.0])},
        "it starts from a Hessian estimate of round 1; the server has that of round 2",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_reply_is_left_out_and_the_round_goes_on(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change, reason = BAD[case]

    def spoil(job: Job, partition: int, reply: Message) -> Message | None:
        bad = (job.server_round, partition) == (3, 1)
        return with_tensors(reply, change) if bad else None

    problem = Problem(tmp_path, softmax_data, make_softmax, F.cross_entropy, nodes=3)
    problem.run(problem.config("fednl", weight_decay=0.01), rounds=4, spoil=spoil)
    assert caplog.text.count("left out the reply") == 1
    assert re.search(rf"round 3: left out .*\(partition 1\): .*{reason}", caplog.text)
    assert not torch.equal(problem.thetas[3], problem.thetas[2])


@pytest.mark.parametrize("place", [-1.0, 0.5, 120.0])
def test_places_outside_of_the_triangle_are_refused(
    place: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def spoil(job: Job, partition: int, reply: Message) -> Message | None:
        return with_tensors(
            reply, lambda sent: sent | {"places": torch.tensor([place])} if "base" in sent else sent
        )

    problem = Problem(tmp_path, softmax_data, make_softmax, F.cross_entropy, nodes=3)
    config = problem.config("fednl", compressor="top", weight_decay=0.01, max_failed_rounds=2)
    problem.run(config, rounds=2, spoil=spoil)
    assert caplog.text.count("its places are not whole numbers from 0 to 119") == 3


def test_a_model_with_too_many_parameters_ends_the_run_at_once(tmp_path: Path) -> None:
    problem = Problem(tmp_path, softmax_data, make_softmax, F.cross_entropy, nodes=3)
    with pytest.raises(ValueError, match="matrices of all 15 parameters, more than max-factor-side=14"):
        problem.run(problem.config("fednl", max_factor_side=14), rounds=1)


@pytest.mark.parametrize(("fraction", "option"), [(1.0, 1), (0.5, 2)])
def test_it_learns_digits_through_the_application(fraction: float, option: int, tmp_path: Path) -> None:
    settings = {
        "algorithm": "fednl", "model": "linear", "weight-decay": 0.01, "fednl-option": option, "alpha": 10.0,
        "fraction-train": fraction, "num-server-rounds": 3, "state-folder": str(tmp_path / "state"),
        "hessian-floor": 0.01, "batch-size": 0,
    }  # fmt: skip
    rows = run_application(tmp_path / "out", settings, nodes=4)
    losses = [row["test-loss"] for row in rows]
    assert [row["clients"] for row in rows[1:]] == [4 * fraction] * 3
    assert losses[1] < losses[0]
    assert losses[-1] < losses[0] - 0.5
