"""Diagonal curvature against the exact Hessian and Gauss-Newton matrix by torch.func."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedpm_flwr.curvature import Diagonal
from fedpm_flwr.estimators import FirstRow, GaussNewtonBartlett, Hutchinson

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cross-entropy": F.cross_entropy, "mse": F.mse_loss}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def batch(loss: str, examples: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(examples, 3, dtype=torch.float64, generator=generator)
    if loss == "mse":
        return x, torch.randn(examples, 3, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 3, (examples,), generator=generator)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def outputs_of(model: nn.Module, theta: Tensor, x: Tensor) -> Tensor:
    shapes = {name: p.shape for name, p in model.named_parameters()}
    parts = torch.split(theta, [shape.numel() for shape in shapes.values()])
    named = {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
    found: Tensor = torch.func.functional_call(model, named, (x,))
    return found


def hessian(model: nn.Module, x: Tensor, y: Tensor, loss: str) -> Tensor:
    found: Tensor = torch.func.hessian(lambda theta: LOSSES[loss](outputs_of(model, theta, x), y))(flat(model))
    return found


def gauss_newton(model: nn.Module, x: Tensor, y: Tensor, loss: str) -> Tensor:
    """Jᵀ H_z J, all examples at once."""
    z = outputs_of(model, flat(model), x)
    jacobian = torch.func.jacrev(lambda theta: outputs_of(model, theta, x))(flat(model)).reshape(z.numel(), -1)
    inner = torch.func.hessian(lambda z: LOSSES[loss](z, y))(z).reshape(z.numel(), z.numel())
    found: Tensor = jacobian.T @ inner @ jacobian
    return found


def measured(estimator: GaussNewtonBartlett | Hutchinson | FirstRow) -> Tensor:
    """All diagonals one after another, as ``flat`` has the parameters."""
    found = estimator.collect()
    assert list(found) == estimator.blocks
    return torch.cat([P.values.flatten() for P in found.values() if isinstance(P, Diagonal)])


def within_three_standard_errors(draws: list[Tensor], expected: Tensor) -> None:
    stacked = torch.stack(draws)
    error = stacked.std(dim=0) / len(draws) ** 0.5
    assert float((stacked.mean(dim=0) - expected).norm()) < 3 * float(error.norm())
    assert float(error.norm()) < 0.3 * float(expected.norm()), "too few draws to tell anything"


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("examples", [1, 5])
def test_gauss_newton_bartlett_is_the_gauss_newton_diagonal_on_average(loss: str, examples: int) -> None:
    model = network()
    x, y = batch(loss, examples)
    expected = gauss_newton(model, x, y, loss).diagonal()
    draws = []
    estimator = GaussNewtonBartlett(model, loss, seed=3)
    for _ in range(400):
        model(x)
        draws.append(measured(estimator))
    within_three_standard_errors(draws, expected)


def test_gauss_newton_bartlett_leaves_gradients_alone_and_passes_over_empty_batches() -> None:
    model = network()
    x, y = batch("mse")
    F.mse_loss(model(x), y).backward()
    plain = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    estimator = GaussNewtonBartlett(model, "mse")
    model(x[:0])
    assert estimator.collect() == {}
    F.mse_loss(model(x), y).backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(new, old) for new, old in zip(found, plain, strict=True))
    estimator.recording = []
    estimator.collect()
    model(x)
    assert estimator.collect() == {}


@pytest.mark.parametrize("loss", LOSSES)
def test_hutchinson_is_the_hessian_diagonal_on_average(loss: str) -> None:
    """With its signs."""
    model = network()
    x, y = batch(loss)
    expected = hessian(model, x, y, loss).diagonal()
    draws = []
    estimator = Hutchinson(model, seed=3)
    for _ in range(800):
        estimator.measure(LOSSES[loss](model(x), y))
        draws.append(measured(estimator))
    within_three_standard_errors(draws, expected)


def test_several_samples_are_their_mean() -> None:
    model = network()
    x, y = batch("mse")
    estimators = [Hutchinson(model, samples=samples, seed=4) for samples in (3, 1)]
    estimators[0].measure(F.mse_loss(model(x), y))
    for _ in range(3):
        estimators[1].measure(F.mse_loss(model(x), y))
    torch.testing.assert_close(measured(estimators[0]), measured(estimators[1]))


class Separable(nn.Module):
    """A loss whose Hessian is diagonal, of both signs."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))

    def forward(self) -> Tensor:
        return (self.w**3).sum() + 2 * self.b**2


def test_hutchinson_is_exact_for_a_diagonal_hessian() -> None:
    model = Separable()
    estimator = Hutchinson(model)
    estimator.measure(model())
    torch.testing.assert_close(measured(estimator), torch.tensor([6.0, -12.0, 3.0, 4.0], dtype=torch.float64))


def test_a_loss_that_is_linear_has_no_curvature() -> None:
    model = Separable()
    for estimator in (Hutchinson(model), FirstRow(model, None)):
        estimator.measure(model.w.sum() + model.b)
        assert torch.equal(measured(estimator), torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("loss", LOSSES)
def test_the_first_row_gives_its_square_over_its_first_entry(loss: str) -> None:
    model = network()
    x, y = batch(loss)
    row = hessian(model, x, y, loss)[0]
    estimator = FirstRow(model, None)
    estimator.measure(LOSSES[loss](model(x), y))
    torch.testing.assert_close(measured(estimator), row**2 / row[0])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_first_row_is_exact_for_a_hessian_of_rank_one(sign: float) -> None:
    model = nn.Linear(3, 1, bias=False).double()
    x = torch.randn(1, 3, dtype=torch.float64)
    estimator = FirstRow(model, None)
    estimator.measure(sign * 0.5 * model(x).square().sum())
    torch.testing.assert_close(measured(estimator), sign * x[0] ** 2)


def test_the_row_is_that_of_the_first_entry_with_a_gradient() -> None:
    """The first input is always 0, as the first pixel of a digit."""
    model = nn.Linear(3, 1, bias=False).double()
    x = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64)
    estimator = FirstRow(model, None)
    estimator.measure(0.5 * model(x).square().sum())
    torch.testing.assert_close(measured(estimator), x[0] ** 2)


def test_an_entry_with_a_gradient_but_no_curvature_gives_none() -> None:
    model = nn.Linear(2, 1, bias=False).double()
    estimator = FirstRow(model, None)
    estimator.measure(model.weight[0, 0] + model.weight[0, 1] ** 2)
    assert torch.equal(measured(estimator), torch.zeros(2, dtype=torch.float64))


def test_diagonals_have_the_form_of_their_parameters_and_measurements_are_averaged() -> None:
    model = nn.Conv1d(2, 3, 2).double()
    estimator = FirstRow(model, None)
    batches = torch.randn(2, 4, 2, 5, dtype=torch.float64)
    single = []
    for x in batches:
        estimator.measure(model(x).square().mean())
        single.append(estimator.collect())
    for x in batches:
        estimator.measure(model(x).square().mean())
    both = estimator.collect()
    assert [block.parameters for block in both] == [("weight",), ("bias",)]
    assert [tuple(P.parts()["values"].shape) for P in both.values()] == [(3, 4), (3, 1)]
    for block, P in both.items():
        mean = sum(one[block].parts()["values"] for one in single) / 2
        torch.testing.assert_close(P.parts()["values"], mean)
