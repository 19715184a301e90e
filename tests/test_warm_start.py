"""An optimizer's running average, begun with somebody else's P."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedpm_flwr.curvature import Block, Diagonal, KroneckerRight, LayerCurvature
from fedpm_flwr.optim import FOOF, Sophia

from .helpers import relative_error, spd

RATE, DAMPING = 0.3, 0.2


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2, bias=False).double()


def batch(seed: int = 0) -> Tensor:
    return torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def given(dtype: torch.dtype = torch.float64) -> Tensor:
    return spd(3, torch.Generator().manual_seed(5)).to(dtype)


def told(factor: Tensor) -> list[LayerCurvature]:
    return [LayerCurvature(Block("any", ("weight",)), KroneckerRight(factor), 9.0)]


def foof(model: nn.Module, **options: Any) -> FOOF:
    return FOOF(model, lr=RATE, damping=DAMPING, **{"refresh_interval": 1, "inverse_interval": 1, **options})


def step(model: nn.Linear, optimizer: FOOF, x: Tensor) -> Tensor:
    """One step; returns (W before − W after) / η."""
    before = model.weight.detach().clone()
    optimizer.zero_grad()
    model(x).square().sum().div(2 * len(x)).backward()
    optimizer.step()
    return (before - model.weight.detach()) / RATE


@pytest.mark.parametrize("ema", [0.0, 0.7, 0.95, 1.0])
def test_the_first_step_is_by_the_mix_of_the_given_and_the_measured(ema: float) -> None:
    model, x = layer(), batch()
    optimizer = foof(model, ema=ema)
    optimizer.warm_start(told(given()))
    measured = x.T @ x / len(x)
    gradient = model.weight.detach() @ measured
    mixed = ema * given() + (1 - ema) * measured
    expected = gradient @ torch.linalg.inv(mixed + DAMPING * torch.eye(3).double())
    assert relative_error(step(model, optimizer, x), expected) < 1e-12
    (now,) = optimizer.preconditioners()
    assert relative_error(now.curvature.parts()["factor"], mixed) < 1e-12
    assert now.damping == DAMPING


def test_the_average_goes_on_as_of_endless_measurements() -> None:
    model, ema = layer(), 0.8
    optimizer, expected = foof(model, ema=ema), given()
    optimizer.warm_start(told(given()))
    for seed in range(4):
        x = batch(seed)
        step(model, optimizer, x)
        expected = ema * expected + (1 - ema) * x.T @ x / len(x)
    assert relative_error(optimizer.preconditioners()[0].curvature.parts()["factor"], expected) < 1e-12


def test_between_measurements_steps_are_by_the_given_one_and_what_was_measured_is_forgotten() -> None:
    model, x = layer(), batch()
    optimizer = foof(model, ema=0.9, refresh_interval=5, inverse_interval=5)
    step(model, optimizer, x)
    optimizer.warm_start(told(given()))
    gradient = model.weight.detach() @ (x.T @ x) / len(x)
    expected = gradient @ torch.linalg.inv(given() + DAMPING * torch.eye(3).double())
    assert relative_error(step(model, optimizer, x), expected) < 1e-12


def test_a_float32_mean_does_not_cost_the_measurements_their_precision() -> None:
    model, x = layer(), batch()
    optimizer = foof(model, ema=0.5)
    optimizer.warm_start(told(given(torch.float32)))
    step(model, optimizer, x)
    mixed = 0.5 * given(torch.float32).double() + 0.5 * x.T @ x / len(x)
    assert relative_error(optimizer.preconditioners()[0].curvature.parts()["factor"], mixed) < 1e-14


def test_unknown_layers_are_passed_over() -> None:
    model = layer()
    optimizer = foof(model)
    optimizer.warm_start([LayerCurvature(Block("other", ("other",)), Diagonal(torch.ones(1, 3)), 0.0)])
    assert optimizer.preconditioners() == []


class Bowl(nn.Module):
    """½ Σ hⱼ wⱼ², whose Hessian's diagonal Hutchinson finds exactly."""

    def __init__(self, h: Tensor) -> None:
        super().__init__()
        self.h, self.w = h, nn.Parameter(torch.ones(len(h), dtype=torch.float64))

    def forward(self) -> Tensor:
        return (self.h * self.w.square()).sum() / 2


def test_sophia_tells_what_it_was_given_mixed_with_what_it_measures() -> None:
    """P = γh: after P ← β₂P + (1 − β₂)γĥ nothing is scaled up for a start from 0."""
    h, gamma, beta = torch.tensor([1.0, 4.0]).double(), 0.5, 0.9
    model = Bowl(h)
    optimizer = Sophia(model, gamma=gamma, betas=(0.0, beta), estimator="hutchinson", refresh_interval=1)
    start = torch.tensor([[3.0], [0.25]]).double()
    optimizer.warm_start([LayerCurvature(Block("w", ("w",)), Diagonal(start), 0.0)])
    loss = model()
    optimizer.measure(loss)
    loss.backward()
    optimizer.step()
    (now,) = optimizer.preconditioners()
    expected = beta * start + (1 - beta) * gamma * h[:, None]
    assert torch.allclose(now.curvature.parts()["values"].reshape(2, 1), expected, rtol=1e-14, atol=0)
