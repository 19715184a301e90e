"""I1: with K = 1 and full gradients, a round is one Newton-like step of the global objective.

Where FOOF is exact, linear least squares, it is the Newton step itself: one round through the real
strategy and ClientApp lands on the least-squares solution of the pooled data.
"""

import pytest
import torch
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn

from fedpm_flwr.curvature import Block, KroneckerRight, LayerCurvature
from fedpm_flwr.strategy import FedPM
from fedpm_flwr.wire import pack_layers

from .apps import federate, half_squared_error, regression_client
from .helpers import CODECS, relative_error

SIZES = [12, 40, 25, 90]
IN, OUT = 5, 3


def client_data(partition: int) -> tuple[Tensor, Tensor]:
    """Clients of unequal size, with inputs of different mean and scale, and noisy targets."""
    generator = torch.Generator().manual_seed(partition)
    mixing = torch.randn(IN, IN, dtype=torch.float64, generator=generator)
    x = torch.randn(SIZES[partition], IN, dtype=torch.float64, generator=generator) @ mixing + partition
    y = torch.randn(SIZES[partition], OUT, dtype=torch.float64, generator=generator) + x[:, :OUT] ** 2
    return x, y


def make_model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT).double()


def joint(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([state["weight"], state["bias"][:, None]], dim=1)


def pooled_solution() -> Tensor:
    """[W | b] of least squares on all clients' data together."""
    x = torch.cat([client_data(i)[0] for i in range(len(SIZES))])
    y = torch.cat([client_data(i)[1] for i in range(len(SIZES))])
    with_ones = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    solution: Tensor = torch.linalg.lstsq(with_ones, y).solution
    return solution.T


def test_one_round_lands_on_the_pooled_solution() -> None:
    client = regression_client(client_data, make_model, lr=1.0, damping=1e-12)
    result = federate(client, FedPM(codec="triangle-float64"), make_model(), len(SIZES))
    found = joint(result.arrays.to_torch_state_dict())
    assert relative_error(found, pooled_solution()) < 1e-8


def test_averaging_the_same_local_steps_does_not() -> None:
    client = regression_client(client_data, make_model, lr=1.0, damping=1e-12)
    result = federate(client, FedAvg(), make_model(), len(SIZES))
    found = joint(result.arrays.to_torch_state_dict())
    assert relative_error(found, pooled_solution()) > 0.1


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("weighting", ["num-examples", "uniform"])
@pytest.mark.parametrize(("rate", "server_rate", "damping"), [(1.0, 1.0, 1e-3), (0.3, 0.7, 0.5)])
def test_one_round_is_the_step_by_the_decoded_curvature(
    codec: str, weighting: str, rate: float, server_rate: float, damping: float
) -> None:
    """θ⁺ = θ − η η_s (Σ wᵢPᵢ)⁻¹ Σ wᵢgᵢ with the decoded damped Pᵢ, to 1e-10, whatever the codec lost."""
    client = regression_client(client_data, make_model, lr=rate, damping=damping)
    strategy = FedPM(codec=codec, weighting=weighting, server_learning_rate=server_rate)
    result = federate(client, strategy, make_model(), len(SIZES))

    weights = torch.tensor(SIZES if weighting == "num-examples" else [1] * len(SIZES), dtype=torch.float64)
    weights = weights / weights.sum()
    curvature = torch.zeros(IN + 1, IN + 1, dtype=torch.float64)
    gradient = torch.zeros(OUT, IN + 1, dtype=torch.float64)
    for weight, partition in zip(weights, range(len(SIZES)), strict=True):
        x, y = client_data(partition)
        model = make_model()
        half_squared_error(model(x), y).backward()
        with_ones = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
        exact = with_ones.T @ with_ones / len(x)
        layer = LayerCurvature(Block("", ("weight", "bias")), KroneckerRight(exact), damping)
        ((arrived),) = pack_layers([layer], codec, dict(model.named_parameters()))
        curvature += weight * arrived.curvature.damped(damping).to_dense(IN + 1)
        gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        gradient += weight * joint(gradients)
    step = torch.linalg.solve(curvature, gradient.T).T
    expected = joint(dict(make_model().state_dict())) - rate * server_rate * step
    assert relative_error(joint(result.arrays.to_torch_state_dict()), expected) < 1e-10
