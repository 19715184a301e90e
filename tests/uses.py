"""The library as other projects use it: run, and checked as mypy --strict and pyright check it, against the wheel.

``python uses.py`` runs all of it on Flower and PyTorch alone; nothing here may import anything else of the tests.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAdam, FedAvg, Result, Strategy
from torch import Tensor, nn

from fedpm_flwr.checkpointed import Checkpointed
from fedpm_flwr.curvature import KINDS, Block, Curvature, Diagonal, KroneckerRight, LayerCurvature
from fedpm_flwr.guarded import Guarded
from fedpm_flwr.inline import run_inline
from fedpm_flwr.messages import (
    PARTITION_ACTION,
    Preconditioned,
    curvature_record,
    partition_of,
    partition_reply,
    train_reply,
)
from fedpm_flwr.mixing import mix
from fedpm_flwr.optim import FOOF, KFAC, LTDA, Newton, SecondOrder, Sophia
from fedpm_flwr.packing import PackedGrid, packed_arrays
from fedpm_flwr.privacy import refuse_differential_privacy
from fedpm_flwr.reproducible import PartitionOrderedGrid
from fedpm_flwr.strategy import FedPM
from fedpm_flwr.training import FitResult, fit
from fedpm_flwr.wire import decode, encode

CLIENTS, ROUNDS = 3, 3
TRUE = torch.tensor([[1.0, -2.0, 0.5]])


def make_model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def local_data(partition: int) -> tuple[Tensor, Tensor]:
    """Inputs [64, 3] of which each client sees but one column well, and targets [64, 1] of the same law."""
    generator = torch.Generator().manual_seed(partition)
    inputs = torch.randn(64, 3, generator=generator) * (torch.arange(3) == partition % 3).float().add(0.03)
    return inputs, inputs @ TRUE.T + 0.7


# A client with a loop of its own: the README's changed lines.

client_app = ClientApp(mods=[packed_arrays])


@client_app.train()
def train(msg: Message, context: Context) -> Message:
    model = make_model()
    model.load_state_dict(msg.content.array_records["arrays"].to_torch_state_dict())
    optimizer = FOOF(model, lr=0.5, damping=1e-3, momentum=0.0)
    inputs, targets = local_data(partition_of(context)[0])
    loss = torch.tensor(0.0)
    for start in range(0, len(inputs), 16):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs[start : start + 16]), targets[start : start + 16])
        loss.backward()
        optimizer.step()
    content = RecordDict(
        {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"train_loss": loss.item(), "num-examples": len(inputs)}),
            "curvature": curvature_record(optimizer, msg),
        }
    )
    return Message(content=content, reply_to=msg)


@client_app.query(PARTITION_ACTION)
def partition(msg: Message, context: Context) -> Message:
    return partition_reply(msg, context)


# The same by the library's own loop, with whichever optimizer.


def every_optimizer(model: nn.Module) -> list[SecondOrder]:
    return [
        FOOF(model, lr=0.1, damping=1.0, position_stride=2),
        KFAC(model, lr=0.1, damping=1.0, fisher="empirical", clip=1.0),
        Sophia(model, lr=0.01, estimator="hutchinson"),
        LTDA(model, lr=0.1, damping=1.0),
        Newton(model, model.parameters(), lr=1.0, damping=1e-3, matrix="ggn"),
    ]


def one_epoch(model: nn.Module, optimizer: SecondOrder, partition: int) -> FitResult:
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)
    result = fit(model, [local_data(partition)], optimizer, nn.functional.mse_loss, epochs=1)
    scheduler.step()
    optimizer.load_state_dict(optimizer.state_dict())
    return result


# A kind of curvature and an optimizer that are not the library's.


@dataclass(frozen=True, eq=False)
class Scalar(Curvature):
    """P = cI, c [1, 1]: one number for a layer."""

    kind = "uses-scalar"
    positive = frozenset({"value"})
    value: Tensor

    def matmul(self, delta: Tensor) -> Tensor:
        return self.value * delta

    def solve(self, rhs: Tensor) -> Tensor:
        return rhs / self.value

    def inverse(self) -> Scalar:
        return Scalar(1 / self.value)

    def damped(self, damping: float) -> Scalar:
        return Scalar(self.value + damping)

    def scaled(self, factor: float) -> Scalar:
        return Scalar(self.value * factor)

    def plus_closed(self, other: Curvature) -> Curvature | None:
        return Scalar(self.value + other.value) if isinstance(other, Scalar) else None

    def diagonal(self, rows: int, columns: int) -> Tensor:
        return self.value.expand(rows, columns)

    def to_dense(self, size: int) -> Tensor:
        return self.value * torch.eye(size)

    def check_positive_definite(self) -> None:
        if not self.value > 0:
            raise ValueError(f"{self.value.item()} is not positive")

    @classmethod
    def fits(cls, shapes: Mapping[str, Sequence[int]], rows: int, columns: int) -> bool:
        return list(shapes["value"]) == [1, 1]


KINDS[Scalar.kind] = Scalar


class Scaled(torch.optim.SGD):
    """SGD that tells the mean square of its inputs as every layer's curvature."""

    def __init__(self, model: nn.Linear, inputs: Tensor) -> None:
        super().__init__(model.parameters(), lr=0.1)
        self._value = inputs.square().mean().reshape(1, 1)

    def preconditioners(self) -> list[LayerCurvature]:
        return [LayerCurvature(Block("layer", ("weight", "bias")), Scalar(self._value), damping=0.1)]


own_app = ClientApp(mods=[packed_arrays])
own_app.query(PARTITION_ACTION)(partition)


@own_app.train()
def train_with_own_curvature(msg: Message, context: Context) -> Message:
    refuse_differential_privacy()
    model = make_model()
    model.load_state_dict(msg.content.array_records["arrays"].to_torch_state_dict())
    inputs, targets = local_data(partition_of(context)[0])
    optimizer: Preconditioned = Scaled(model, inputs)
    assert isinstance(optimizer, torch.optim.Optimizer)
    result = fit(model, [(inputs, targets)], optimizer, nn.functional.mse_loss, epochs=5)
    return train_reply(msg, model, {"num-examples": len(inputs), "loss": result.loss}, optimizer)


# Strategies, and grids around Flower's.


class GuardedFedAdam(Guarded, FedAdam):
    """Flower's FedAdam with rounds that go on without what cannot be used."""


def strategies(folder: Path) -> list[Strategy]:
    return [
        FedAvg(fraction_evaluate=0.0),
        FedPM(fraction_evaluate=0.0, codec="triangle-int8", damping_bounds=(0.0, 1e3), correction="none"),
        GuardedFedAdam(min_replies=2, max_failed_rounds=1, eta=0.1, fraction_evaluate=0.0),
        Checkpointed(FedPM(weighting="uniform", fraction_evaluate=0.0), folder / "checkpoints", every=2, keep=2),
    ]


def run(client: ClientApp, strategy: Strategy, update: str = "none") -> tuple[Result, float]:
    """The result, and how far its model is from the law of the data."""
    server_app, results = ServerApp(), list[Result]()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        initial = ArrayRecord(make_model().state_dict())
        ordered = PartitionOrderedGrid(PackedGrid(grid, update=update), seed=0)
        results.append(strategy.start(grid=ordered, initial_arrays=initial, num_rounds=ROUNDS))

    run_inline(server_app, client, CLIENTS, {"my-setting": 1}, seed=0)
    assert results[0].arrays is not None
    weight = results[0].arrays.to_torch_state_dict()["weight"]
    return results[0], float((weight - TRUE).norm() / TRUE.norm())


# What travels, and the equation, without Flower.


def mixed_by_hand() -> Tensor:
    """Two clients that are right in one column each, and know it."""
    clients = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])]
    curvatures: list[Curvature] = [
        KroneckerRight(torch.diag(torch.tensor([1e4, 1.0]))),
        Diagonal(torch.tensor([[1.0, 1e4]])),
    ]
    layers = [LayerCurvature(Block("layer", ("weight",)), curvature, 0.0) for curvature in curvatures]
    arrived = [decode(encode([layer], "triangle-float64"), {"weight": (1, 2)})[0] for layer in layers]
    return mix(
        torch.zeros(1, 2), clients, [layer.curvature.damped(layer.damping) for layer in arrived], [0.5, 0.5]
    )


def main(folder: Path) -> None:
    averaged, mixed, adam, checkpointed = (run(client_app, strategy) for strategy in strategies(folder))
    assert mixed[1] < 0.1 * averaged[1], (mixed[1], averaged[1])
    assert checkpointed[1] < 0.1 * averaged[1], (checkpointed[1], averaged[1])
    assert len(adam[0].train_metrics_clientapp) == ROUNDS
    assert any((folder / "checkpoints").iterdir())
    assert run(client_app, FedPM(fraction_evaluate=0.0), update="int8")[1] < averaged[1]
    own, plain = (run(own_app, strategy(fraction_evaluate=0.0)) for strategy in (FedPM, FedAvg))
    assert len(own[0].train_metrics_clientapp) == ROUNDS
    assert own[1] != plain[1]  # mixed through the clients' own kind
    for optimizer in every_optimizer(model := make_model()):
        result = one_epoch(model, optimizer, partition=0)
        assert result.steps == 1, optimizer
        assert not result.diverged, optimizer
        assert optimizer.preconditioners(), optimizer
    torch.testing.assert_close(mixed_by_hand(), torch.tensor([[1.0, 2.0]]), rtol=1e-3, atol=0.0)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
    print(f"all uses run, on Python {sys.version.split()[0]}, with {sys.modules['fedpm_flwr'].__file__}")
