"""Six clients of very different small logistic regressions, in float64; settings for exact Newton steps."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedpm_flwr.config import Config
from fedpm_flwr.objective import Objective
from fedpm_flwr.tasks.models import Logistic

from .jobs import Examples

SIZES = [30, 50, 20, 60, 40, 40]
IN = 4
BASE = Config(
    algorithm="fedpm-corrected",
    optimizer="newton",
    learning_rate=1.0,
    damping=0.0,
    ema=0.0,
    refresh_interval=1,
    inverse_interval=1,
    codec="triangle-float64",
    weight_decay=0.05,
    local_steps=3,
    batch_size=0,
)


def client_data(partition: int) -> Examples:
    """Inputs of other means and scales, and other separating planes, at each client."""
    generator = torch.Generator().manual_seed(partition)
    x = torch.randn(SIZES[partition], IN, dtype=torch.float64, generator=generator)
    x = x * (1 + torch.arange(IN) * (partition + 1) / 6) + 0.5 * (partition - 2)
    plane = torch.randn(IN, dtype=torch.float64, generator=generator)
    noise = torch.randn(SIZES[partition], dtype=torch.float64, generator=generator)
    return x, (x @ plane + noise > 0).long()


def batches_of(partition: int, size: int) -> list[Examples]:
    x, y = client_data(partition)
    return list(zip(torch.split(x, size), torch.split(y, size), strict=True))


def make_model() -> nn.Module:
    return Logistic(IN).double()


def minimiser(weights: list[float]) -> Tensor:
    """θ* of Σ wᵢfᵢ / Σ wᵢ, by Newton's method."""
    model, total = make_model(), sum(weights)
    clients = [Objective(model, [client_data(i)], F.cross_entropy, BASE.weight_decay) for i in range(len(SIZES))]

    def mean(parts: list[Tensor]) -> Tensor:
        return torch.stack([w / total * part for w, part in zip(weights, parts, strict=True)]).sum(0)

    for _ in range(30):
        gradient = mean([one.gradient() for one in clients])
        step = torch.linalg.solve(mean([one.hessian() for one in clients]), gradient)
        clients[0].move_to(clients[0].theta - step)
    assert mean([one.gradient() for one in clients]).norm() < 1e-14
    return clients[0].theta
