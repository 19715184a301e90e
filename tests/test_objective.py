"""A client's whole objective against torch.func, in float64."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian

from fedpm_flwr.curvature import to_matrix
from fedpm_flwr.objective import Objective

DECAY = 0.3


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    x = torch.randn(10, 3, dtype=torch.float64, generator=generator)
    return model, x, torch.randint(2, (10,), generator=generator)


def oracle(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """f as a function of the vector, and the vector."""
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    model.eval()

    def f(theta: Tensor) -> Tensor:
        parts = torch.split(theta, [shape.numel() for shape in shapes])
        state = {name: part.reshape(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        loss = F.cross_entropy(functional_call(model, state, (x,)), y)
        return loss + DECAY / 2 * theta.square().sum()

    return f, torch.cat([p.detach().flatten() for p in model.parameters()])


def test_value_gradient_and_hessian_over_unequal_batches() -> None:
    model, x, y = problem()
    model.train()
    objective = Objective(model, [(x[:7], y[:7]), (x[7:], y[7:])], F.cross_entropy, DECAY)
    value, gradient, matrix = objective.value(), objective.gradient(), objective.hessian()
    assert model.training  # dropout was off, and is on again
    f, theta = oracle(model, x, y)
    assert torch.equal(objective.theta, theta)
    assert value == pytest.approx(float(f(theta)), rel=1e-12)
    torch.testing.assert_close(gradient, grad(f)(theta), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(matrix, hessian(f)(theta), rtol=1e-10, atol=1e-12)
    assert all(p.grad is None for p in model.parameters())


def test_the_gauss_newton_matrix_of_a_linear_model_is_its_hessian() -> None:
    _, x, y = problem()
    model = nn.Linear(3, 2).double()
    objective = Objective(model, [(x, y)], F.cross_entropy, DECAY)
    torch.testing.assert_close(objective.hessian("ggn"), objective.hessian(), rtol=1e-10, atol=1e-12)


def test_vectors_and_names() -> None:
    model = nn.Linear(3, 2).double()  # whose joint matrix has the bias as its last column
    objective = Objective(model, [], F.cross_entropy)
    assert torch.equal(objective.theta.reshape(2, 4), to_matrix([model.weight.detach(), model.bias.detach()]))
    vector = torch.arange(8, dtype=torch.float64)
    named = objective.by_name(vector)
    assert torch.equal(objective.to_vector(named), vector)
    assert torch.equal(objective.to_vector({"bias": named["bias"]}).reshape(2, 4)[:, :3], torch.zeros(2, 3))
    objective.move_to(vector)
    assert torch.equal(model.bias.detach(), torch.tensor([3.0, 7.0], dtype=torch.float64))
    assert torch.equal(objective.theta, vector)


def test_frozen_parameters_are_not_part_of_it() -> None:
    model, x, y = problem()
    next(model.parameters()).requires_grad_(False)
    objective = Objective(model, [(x, y)], F.cross_entropy)
    assert len(objective.theta) == sum(p.numel() for p in model.parameters()) - 12
    assert set(objective.by_name(objective.gradient())) == {"0.bias", "3.weight", "3.bias"}
