"""The four changed lines of the README, in an app of the shape that Flower's quickstart gives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, Strategy
from torch import Tensor, nn

from fedpm_flwr.messages import curvature_record
from fedpm_flwr.optim import FOOF
from fedpm_flwr.strategy import FedPM

from .apps import federate
from .helpers import relative_error

TRUE = torch.tensor([[1.0, -2.0, 0.5]])


def make_model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def local_data(partition: int) -> tuple[Tensor, Tensor]:
    """The same law at every client, seen through inputs that differ in scale and place."""
    generator = torch.Generator().manual_seed(partition)
    x = torch.randn(64, 3, generator=generator) * (torch.arange(3) == partition % 3).float().mul(3).add(0.3)
    return x, x @ TRUE.T + 0.7


def quickstart_client(changed: bool) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(msg: Message, context: Context) -> Message:
        model = make_model()
        model.load_state_dict(msg.content.array_records["arrays"].to_torch_state_dict())
        optimizer: Any = (
            FOOF(model, lr=0.5, damping=1e-3) if changed else torch.optim.SGD(model.parameters(), lr=0.05)
        )
        x, y = local_data(int(context.node_config["partition-id"]))
        for _ in range(3):
            for i in range(0, 64, 16):
                optimizer.zero_grad()
                loss = 0.5 * (model(x[i : i + 16]) - y[i : i + 16]).square().mean()
                loss.backward()
                optimizer.step()
        records: dict[str, Any] = {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"train_loss": loss.item(), "num-examples": 64}),
        }
        if changed:
            records["curvature"] = curvature_record(optimizer, msg)
        return Message(content=RecordDict(records), reply_to=msg)

    return app


def error_of(client: ClientApp, strategy: Strategy, rounds: int = 3) -> float:
    state = federate(client, strategy, make_model(), 3, rounds=rounds).arrays.to_torch_state_dict()
    found = torch.cat([state["weight"], state["bias"][:, None]], dim=1)
    return relative_error(found, torch.cat([TRUE, torch.tensor([[0.7]])], dim=1))


def test_the_changed_app_learns_faster_than_the_one_before() -> None:
    before = error_of(quickstart_client(changed=False), FedAvg())
    after = error_of(quickstart_client(changed=True), FedPM())
    assert after < 1e-2 < before


@pytest.mark.parametrize(
    ("client", "strategy"), [(True, FedAvg), (False, FedPM)], ids=["client-only", "strategy-only"]
)
def test_half_the_change_still_trains(client: bool, strategy: Callable[[], Strategy]) -> None:
    assert error_of(quickstart_client(client), strategy(), rounds=10) < 0.6
