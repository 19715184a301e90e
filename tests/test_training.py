"""Local training and evaluation."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from fedpm_flwr.config import Config
from fedpm_flwr.curvature import CurvatureError
from fedpm_flwr.optim import correct_gradients
from fedpm_flwr.optimizers import sgd
from fedpm_flwr.training import derive_seed, evaluate, fit, loader, pick_device, reproducible


@pytest.fixture
def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(10, 3, generator=generator), torch.randint(0, 2, (10,), generator=generator))


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [({}, 3), ({"epochs": 2}, 6), ({"steps": 1}, 1), ({"steps": 7}, 7), ({"steps": 2, "epochs": 9}, 2)],
)
def test_steps_and_epochs(data: TensorDataset, arguments: dict[str, Any], steps: int) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result = fit(model, loader(data, 4), optimizer, cross_entropy, **arguments)
    assert result.steps == steps


def test_fit_reports_the_mean_loss_per_example_and_moves_as_the_optimizer_does(data: TensorDataset) -> None:
    torch.manual_seed(0)
    model, twin = nn.Linear(3, 2), nn.Linear(3, 2)
    twin.load_state_dict(model.state_dict())
    expected = cross_entropy(twin(data.tensors[0]), data.tensors[1]).item()
    frozen = fit(model, loader(data, 4), torch.optim.SGD(model.parameters(), lr=0.0), cross_entropy)
    assert frozen.loss == pytest.approx(expected, rel=1e-5)
    fit(model, loader(data, 0), torch.optim.SGD(model.parameters(), lr=0.5), cross_entropy)
    cross_entropy(twin(data.tensors[0]), data.tensors[1]).backward()
    assert twin.weight.grad is not None
    torch.testing.assert_close(model.weight, twin.weight - 0.5 * twin.weight.grad)


def test_fit_trains_and_evaluate_does_not(data: TensorDataset) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))
    evaluate(model, loader(data, 4), cross_entropy)
    assert not model.training
    fit(model, loader(data, 4), torch.optim.SGD(model.parameters(), lr=0.1), cross_entropy)
    assert model.training


def test_evaluate_gives_mean_loss_and_accuracy() -> None:
    outputs = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    targets = torch.tensor([0, 1, 1])
    batches = loader(TensorDataset(outputs, targets), 2)
    loss, accuracy = evaluate(nn.Identity(), batches, cross_entropy)
    assert accuracy == pytest.approx(2 / 3)
    assert loss == pytest.approx(float(cross_entropy(outputs, targets)))


@pytest.mark.parametrize("seed", [None, 3])
def test_no_data_is_no_step(seed: int | None) -> None:
    model = nn.Linear(3, 2)
    nothing = loader(TensorDataset(torch.zeros(0, 3), torch.zeros(0)), 4, seed)
    result = fit(model, nothing, torch.optim.SGD(model.parameters(), lr=0.1), cross_entropy, steps=5)
    assert (result.loss, result.steps) == (0.0, 0)


def test_the_order_of_examples_is_a_function_of_the_seed(data: TensorDataset) -> None:
    def order(seed: int | None) -> list[float]:
        return [float(x[0]) for batch, _ in loader(data, 3, seed) for x in batch]

    assert order(1) == order(1) != order(2)
    assert order(None) == [float(x[0]) for x in data.tensors[0]]


def test_reproducible_seeds_and_puts_back() -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    drawn = []
    for _ in range(2):
        with reproducible(3, threads + 1, torch.device("cpu")):
            assert torch.get_num_threads() == threads + 1
            drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_derived_seeds_differ() -> None:
    seeds = {derive_seed(a, b, c) for a in range(4) for b in range(4) for c in range(4)}
    assert len(seeds) == 64
    assert derive_seed(1, 2, 3) == derive_seed(1, 2, 3)
    assert derive_seed(5) != derive_seed(5, 0)


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("toaster", "cuda:99", "meta", "hpu"):
        with pytest.raises(ValueError, match=f"device='{name}' is not usable here"):
            pick_device(name)


def test_curvature_that_fails_is_raised_where_the_loss_is_finite_and_ends_training_where_it_is_not() -> None:
    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise CurvatureError("no")

    model = nn.Linear(2, 2)
    optimizer = Failing(model.parameters(), lr=0.1)
    targets = torch.tensor([0, 1])
    with pytest.raises(CurvatureError, match="no"):
        fit(model, [(torch.ones(2, 2), targets)], optimizer, cross_entropy)
    result = fit(model, [(torch.full((2, 2), torch.nan), targets)], optimizer, cross_entropy)
    assert (result.diverged, result.steps) == (True, 0)


@pytest.mark.parametrize(("factor", "diverged"), [(2.1, True), (1.1, False), (0.5, False)])
def test_a_loss_that_grows_without_bound_is_a_divergence_long_before_infinity(
    factor: float, diverged: bool
) -> None:
    """Steepest descent on (w − 3)², each step of which multiplies the distance by −factor."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    batches = [(torch.ones(4, 1), torch.full((4, 1), 3.0))]
    optimizer = torch.optim.SGD(model.parameters(), lr=(1 + factor) / 2)
    result = fit(model, batches, optimizer, nn.functional.mse_loss, epochs=12)
    assert math.isfinite(result.loss)
    assert result.diverged is diverged


def test_a_small_loss_that_rises_is_no_divergence() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    frozen = torch.optim.SGD(model.parameters(), lr=0.0)
    rising = [(torch.ones(1, 1), torch.full((1, 1), target)) for target in (1e-6, 0.0, 2.0, 5.0)]
    assert not fit(model, rising, frozen, nn.functional.mse_loss).diverged
    rising.append((torch.ones(1, 1), torch.full((1, 1), 11.0)))
    assert fit(model, rising[1:], frozen, nn.functional.mse_loss).diverged
    # One odd batch among the last quarter, here of three, is not enough.
    level = [(torch.ones(1, 1), torch.ones(1, 1))] * 11
    assert not fit(model, [*level, rising[-1]], frozen, nn.functional.mse_loss).diverged


def test_accuracy_while_training_is_of_labels_only(data: TensorDataset) -> None:
    model = nn.Linear(3, 2)
    frozen = torch.optim.SGD(model.parameters(), lr=0.0)
    result = fit(model, loader(data, 4), frozen, cross_entropy)
    assert result.accuracy == pytest.approx(evaluate(model, loader(data, 4), cross_entropy)[1])
    inputs = data.tensors[0]
    assert math.isnan(fit(model, [(inputs, inputs[:, :2])], frozen, nn.functional.mse_loss).accuracy)
    assert not result.diverged


@pytest.mark.parametrize(("clip", "length"), [(0.0, 5.0), (0.5, 0.5), (9.0, 5.0)])
def test_plain_steps_by_shortened_gradients(clip: float, length: float) -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    optimizer = sgd(Config(algorithm="fedavg", learning_rate=0.1, clip=clip), model)
    before = [p.detach().clone() for p in model.parameters()]
    for p, gradient in zip(model.parameters(), (3.0, 4.0), strict=True):
        p.grad = torch.full_like(p, gradient)
    optimizer.step()
    moved = [float(old - p) for p, old in zip(model.parameters(), before, strict=True)]
    assert moved == pytest.approx([0.1 * 3 * length / 5, 0.1 * 4 * length / 5], rel=1e-4)


def test_what_is_added_to_a_gradient_is_not_shortened() -> None:
    model = nn.Linear(1, 1, bias=False)
    optimizer = sgd(Config(algorithm="scaffold", learning_rate=1.0, clip=0.5), model)
    correct_gradients(optimizer, lambda p: torch.full_like(p, 2.0))
    before = model.weight.detach().clone()
    model.weight.grad = torch.full_like(model.weight, 4.0)
    optimizer.step()
    assert float(before - model.weight) == pytest.approx(0.5 + 2.0, rel=1e-4)
