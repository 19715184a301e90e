"""Which of its local steps a client of corrected FedPM keeps."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flwr.app import Message
from torch import Tensor, nn

from fedpm_flwr import messages
from fedpm_flwr.curvature import CurvatureError
from fedpm_flwr.method import Job
from fedpm_flwr.objective import Objective
from fedpm_flwr.replies import read_curvature

from .jobs import Examples, answer
from .logistic import BASE, IN, batches_of, client_data, make_model


def pair(value: float) -> dict[str, Tensor]:
    """c, with cᵢ = 0."""
    return {"theta.weight": torch.full((1, IN), value, dtype=torch.float64)}


def metrics_of(reply: Message) -> dict[str, Any]:
    return {**reply.content.metric_records[messages.METRICS]}


def model_of(reply: Message) -> dict[str, Tensor]:
    state: dict[str, Tensor] = reply.content.array_records[messages.ARRAYS].to_torch_state_dict()
    return state


@pytest.mark.parametrize("start", [2.0, 3.0])
def test_steps_that_do_not_halve_the_gradient_are_taken_back(start: float) -> None:
    """Then only the first counts, with the P of that step.

    Of one example in both classes, f = log(1 + exp(−θ))/2 + log(1 + exp(θ))/2: Newton's step leads from θ to
    θ − sinh θ. From 2 to −1.63, where the gradient is 0.88 of what it was; from 3 to −7, where it is larger.
    """
    config = replace(BASE, weight_decay=1e-6, local_steps=4)
    x = torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64).repeat(2, 1)
    batch, model = (x, torch.tensor([1, 0])), make_model()
    objective = Objective(model, [batch], F.cross_entropy, config.weight_decay)
    objective.move_to(torch.tensor([start, 0.0, 0.0, 0.0], dtype=torch.float64))
    theta, gradient, matrix = objective.theta, objective.gradient(), objective.hessian()
    reply = answer(config, model, [batch])
    assert metrics_of(reply)["local-steps"] == 1
    (found,) = model_of(reply).values()
    torch.testing.assert_close(found.flatten(), theta - torch.linalg.solve(matrix, gradient), rtol=1e-10, atol=0)
    (layer,) = read_curvature(reply, {"theta.weight": found})
    torch.testing.assert_close(layer.curvature.damped(layer.damping).to_dense(IN), matrix, rtol=1e-10, atol=1e-14)


def test_steps_that_halve_it_are_kept() -> None:
    reply = answer(BASE, make_model(), [client_data(0)])
    assert metrics_of(reply)["local-steps"] == 3
    plain = answer(replace(BASE, algorithm="fedpm"), make_model(), [client_data(0)])
    assert torch.equal(model_of(reply)["theta.weight"], model_of(plain)["theta.weight"])


@pytest.mark.parametrize("steps", [2, 3])
def test_a_step_that_fails_leaves_the_first(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if it is the last one, after which no gradient is measured."""
    whole, calls = Job.train, []

    def train(job: Job, optimizer: torch.optim.Optimizer, steps: int | None = None) -> bool:
        calls.append(steps)
        if len(calls) == 2:
            raise CurvatureError("singular")
        return whole(job, optimizer, steps)

    monkeypatch.setattr(Job, "train", train)
    reply = answer(replace(BASE, local_steps=steps), make_model(), [client_data(0)])
    assert calls == [1, 1]
    monkeypatch.undo()
    first = answer(replace(BASE, local_steps=1), make_model(), [client_data(0)])
    assert metrics_of(reply)["local-steps"] == 1
    assert torch.equal(model_of(reply)["theta.weight"], model_of(first)["theta.weight"])


@pytest.mark.parametrize(
    ("rate", "value", "kept", "diverged"),
    [
        (0.5, 50.0, 6, None),
        (2.2, 50.0, 0, 1),  # beyond 2 Newton's steps diverge, FedPM's own too
        (0.5, 1e308, 0, None),  # beyond what float64 holds
    ],
)
def test_batches_fall_back_to_fedpms_own_steps(
    rate: float, value: float, kept: int, diverged: int | None, tmp_path: Path
) -> None:
    """Corrected steps that raise the corrected gradient, or end in no number, are taken again without it."""
    config = replace(BASE, local_steps=6, learning_rate=rate, batch_size=10)
    reply = answer(config, make_model(), batches_of(1, 10), pair(value), tmp_path)
    plain = answer(replace(config, algorithm="fedpm"), make_model(), batches_of(1, 10))
    metrics = metrics_of(reply)
    assert (metrics["corrected-steps"], metrics["local-steps"]) == (kept, 6)
    assert metrics.get(messages.DIVERGED) == metrics_of(plain).get(messages.DIVERGED) == diverged
    assert torch.equal(model_of(reply)["theta.weight"], model_of(plain)["theta.weight"]) == (not kept)


@pytest.mark.filterwarnings("ignore:no curvature for")  # of the normalisation
def test_statistics_too_are_as_if_the_corrected_steps_had_never_been(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.BatchNorm1d(IN), nn.Linear(IN, 2)).double()

    config = replace(BASE, local_steps=6, learning_rate=0.5, damping=1.0, optimizer="foof", batch_size=10)
    wild = {"1.weight": torch.full((2, IN), 1e308, dtype=torch.float64)}
    reply = answer(config, make(), batches_of(1, 10), wild, tmp_path)
    plain = answer(replace(config, algorithm="fedpm"), make(), batches_of(1, 10))
    assert metrics_of(reply)["corrected-steps"] == 0
    for key, value in model_of(plain).items():
        assert torch.equal(model_of(reply)[key], value), key


def test_without_a_pair_batches_are_fedpms(tmp_path: Path) -> None:
    config = replace(BASE, local_steps=6, learning_rate=0.5, batch_size=10)
    reply = answer(config, make_model(), batches_of(1, 10))
    plain = answer(replace(config, algorithm="fedpm"), make_model(), batches_of(1, 10))
    assert torch.equal(model_of(reply)["theta.weight"], model_of(plain)["theta.weight"])


class Passes(list[Examples]):
    """Batches that count how often somebody goes through them."""

    taken = 0

    def __iter__(self) -> Iterator[Examples]:
        self.taken += 1
        return super().__iter__()


def passes(algorithm: str, folder: Path) -> int:
    """How often its client goes through the batches that it trains on."""
    config = replace(BASE, algorithm=algorithm, local_steps=6, learning_rate=0.5, damping=1.0, batch_size=10)
    batches, whole = Passes(batches_of(1, 10)), batches_of(1, 10)
    common = pair(50.0) if algorithm == "fedpm-corrected" else None
    answer(config, make_model(), batches, common, folder, whole=whole)
    return batches.taken - 1  # once to count the examples


def test_gradients_of_the_whole_data_take_no_batches(tmp_path: Path) -> None:
    """Shuffled and augmented batches are those that they would be without such gradients."""
    assert passes("fedpm-corrected", tmp_path) == passes("fedpm", tmp_path) > 0
    assert passes("fednew", tmp_path) == 0
