"""Clients that each train in another way, in one run in Flower's simulation: ``python -m tests.every_kind DIR``.

By partition: a closure and a scheduler; autocast and clipped gradients; accumulated gradients; a frozen layer and
an adapter; arrays in another order and float16; plain SGD; more metrics and records; one that only evaluates. The
model has BatchNorm's buffers. DIR gets the model by Ray and by one process, each as NAME.safetensors, and
metrics.json with what each told of each round.
"""

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result
from flwr.simulation import run_simulation
from safetensors.torch import save_file
from torch import Tensor, nn

from fedpm_flwr.inline import run_inline
from fedpm_flwr.messages import curvature_record
from fedpm_flwr.optim import FOOF
from fedpm_flwr.reproducible import PartitionOrderedGrid
from fedpm_flwr.strategy import FedPM

from .apps import tell_partitions

ROUNDS = 2
Batches = list[tuple[Tensor, Tensor]]
Kind = Callable[[nn.Module, Batches], torch.optim.Optimizer]


class Net(nn.Module):
    """With an adapter beside its body, and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.norm, self.head = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.down, self.up = nn.Linear(5, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(torch.relu(self.norm(self.body(x) + self.up(self.down(x)))))
        return outputs


def data(partition: int) -> Batches:
    generator = torch.Generator().manual_seed(partition)
    x = torch.randn(4, 16, 5, generator=generator) * (1 + partition / 4)
    return [(part, part[:, :3].argmax(1)) for part in x]


def foof(model: nn.Module) -> FOOF:
    return FOOF(model, lr=0.2, damping=0.1)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def plain(model: nn.Module, batches: Batches, optimizer: torch.optim.Optimizer | None = None) -> Any:
    optimizer = optimizer or foof(model)
    for batch in batches:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    return optimizer


def with_a_closure_and_a_scheduler(model: nn.Module, batches: Batches) -> FOOF:
    optimizer = foof(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    for batch in batches:

        def closure(batch: tuple[Tensor, Tensor] = batch) -> Any:
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        optimizer.step(closure)
        scheduler.step()
    return optimizer


def with_autocast_and_clipping(model: nn.Module, batches: Batches) -> FOOF:
    optimizer = foof(model)
    for batch in batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return optimizer


def accumulating(model: nn.Module, batches: Batches) -> FOOF:
    optimizer = foof(model)
    for number, batch in enumerate(batches):
        (loss_of(model, batch) / 2).backward()
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
    return optimizer


def with_a_frozen_body(model: nn.Module, batches: Batches) -> Any:
    assert isinstance(model, Net)
    model.body.requires_grad_(False)
    return plain(model, batches)


def by_sgd(model: nn.Module, batches: Batches) -> Any:
    return plain(model, batches, torch.optim.SGD(model.parameters(), lr=0.1))


KINDS: list[Kind] = [
    with_a_closure_and_a_scheduler, with_autocast_and_clipping, accumulating, with_a_frozen_body,
    plain, by_sgd, plain,
]  # fmt: skip
OTHER_ORDER_AND_FLOAT16, MORE_RECORDS, ONLY_EVALUATES = 4, 6, 7

app = ClientApp()
tell_partitions(app)


@app.train()
def train(msg: Message, context: Context) -> Message:
    """As the README has it, but for the loop, and what two of the clients add or leave out."""
    partition = int(context.node_config["partition-id"])
    if partition == ONLY_EVALUATES:
        raise RuntimeError("this client only evaluates")
    model, batches = Net(), data(partition)
    model.load_state_dict(msg.content.array_records["arrays"].to_torch_state_dict())
    optimizer = KINDS[partition](model, batches)
    state = model.state_dict()
    if partition == OTHER_ORDER_AND_FLOAT16:
        state = {k: v.half() if v.is_floating_point() else v for k, v in reversed(state.items())}
    metrics: dict[str, Any] = {"num-examples": 64, "seen": float(partition)}
    content = RecordDict({"arrays": ArrayRecord({**state})})
    if isinstance(optimizer, FOOF):
        content["curvature"] = curvature_record(optimizer, msg)
    if partition == MORE_RECORDS:
        metrics |= {"losses": [1.0, 2.0], "alone": 3}
        content["mine"] = ConfigRecord({"note": "to be ignored"})
    content["metrics"] = MetricRecord(metrics)
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    """The loss of the global model on the client's own data."""
    batches = data(int(context.node_config["partition-id"]))
    model = Net()
    model.load_state_dict(msg.content.array_records["arrays"].to_torch_state_dict())
    model.eval()
    with torch.no_grad():
        loss = sum(float(loss_of(model, batch)) for batch in batches) / len(batches)
    metrics = MetricRecord({"num-examples": 64, "loss": loss})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=msg)


def main(folder: Path) -> None:
    """Both runs."""
    told = {}
    for name in ("ray", "inline"):
        server, results = ServerApp(), list[Result]()

        @server.main()
        def serve(grid: Grid, context: Context, results: list[Result] = results) -> None:
            strategy = FedPM(min_available_nodes=len(KINDS) + 1)
            arrays = ArrayRecord(Net().state_dict())
            results.append(strategy.start(PartitionOrderedGrid(grid, 0), arrays, num_rounds=ROUNDS))

        if name == "ray":
            backend: dict[str, Any] = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
            run_simulation(server, app, len(KINDS) + 1, backend_config=backend)
        else:
            run_inline(server, app, len(KINDS) + 1)
        (result,) = results
        save_file(result.arrays.to_torch_state_dict(), folder / f"{name}.safetensors")
        told[name] = [
            {**{key: dict(metrics) for key, metrics in rounds.items()}}
            for rounds in (result.train_metrics_clientapp, result.evaluate_metrics_clientapp)
        ]
    (folder / "metrics.json").write_text(json.dumps(told))


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.INFO)
    main(Path(sys.argv[1]))
