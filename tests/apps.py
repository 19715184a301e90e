"""Small Flower apps in the shape that users write, on the library alone."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor, nn

from fedpm_flwr import messages
from fedpm_flwr.inline import run_inline
from fedpm_flwr.optim import FOOF
from fedpm_flwr.reproducible import PartitionOrderedGrid
from fedpm_flwr.training import Loss, fit

Data = Callable[[int], tuple[Tensor, Tensor]]
"""A client's whole data, by partition."""


def half_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """½‖Wx − y‖², summed over outputs and averaged over samples."""
    return 0.5 * (outputs - targets).square().sum(dim=1).mean()


def regression_client(data: Data, make_model: Callable[[], nn.Module], **options: Any) -> ClientApp:
    """One full-batch FOOF step a round on ½‖Wx − y‖²."""
    return full_batch_client(data, make_model, half_squared_error, partial(FOOF, **options))


def full_batch_client(
    data: Data,
    make_model: Callable[[], nn.Module],
    loss: Loss,
    make_optimizer: Callable[..., torch.optim.Optimizer],
) -> ClientApp:
    """One step a round on the client's whole data, by an optimizer of ``(model, codec=…)``."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        x, y = data(messages.partition_of(context)[0])
        model = make_model()
        model.load_state_dict(message.content.array_records[messages.ARRAYS].to_torch_state_dict())
        optimizer = make_optimizer(model, codec=messages.asked_codec(message))
        result = fit(model, [(x, y)], optimizer, loss)
        return messages.train_reply(message, model, {"num-examples": len(x), "loss": result.loss}, optimizer)

    tell_partitions(app)
    return app


def federate(
    client_app: ClientApp,
    strategy: Strategy,
    model: nn.Module,
    num_supernodes: int,
    rounds: int = 1,
    wrap: Callable[[Grid], Grid] = lambda grid: grid,
    seed: int | None = None,
    train_config: ConfigRecord | None = None,
) -> Result:
    """Run the strategy's own ``start`` over inline clients and return its result."""
    results: list[Result] = []
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        results.append(
            strategy.start(
                wrap(grid),
                initial_arrays=ArrayRecord(model.state_dict()),
                num_rounds=rounds,
                train_config=train_config,
            )
        )

    run_inline(app, client_app, num_supernodes, seed=seed)
    return results[0]


def tell_partitions(app: ClientApp) -> None:
    """Let the app's nodes say which partition they hold."""

    @app.query(messages.PARTITION_ACTION)
    def partition(message: Message, context: Context) -> Message:
        return messages.partition_reply(message, context)


def ordered(grid: Grid) -> Grid:
    """With node IDs and replies in the order of partitions."""
    return PartitionOrderedGrid(grid, 0)


def reply_with(
    request: Message,
    arrays: ArrayRecord,
    metrics: Mapping[str, float | list[float]],
    **records: ArrayRecord | MetricRecord | ConfigRecord,
) -> Message:
    """A training reply with whatever a test wants in it."""
    content = RecordDict({messages.ARRAYS: arrays, messages.METRICS: MetricRecord({**metrics})})
    for name, record in records.items():
        content[name] = record
    return Message(content, reply_to=request)
