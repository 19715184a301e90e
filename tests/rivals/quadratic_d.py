"""A method's own client and strategy on ½ (x w − y)², one weight, in float64; and clients that send rubbish."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Result
from torch import nn

from fedpm_flwr import messages
from fedpm_flwr.config import Config
from fedpm_flwr.method import Job, Method
from fedpm_flwr.state import ClientState

from ..apps import federate, half_squared_error

Data = Mapping[int, tuple[list[float], list[float]]]
"""By partition: the inputs x and the targets y, an example each."""
Spoil = Callable[[Message], None]


def weight(value: float = 0.0) -> nn.Linear:
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, value)
    return model


def client(method: Method, config: Config, data: Data, folder: Path) -> ClientApp:
    """All of a client's examples are one batch."""
    app = ClientApp()

    def job(message: Message, context: Context) -> Job:
        partition = messages.partition_of(context)[0]
        x, y = (torch.tensor(values, dtype=torch.float64)[:, None] for values in data[partition])
        model = weight()
        model.load_state_dict(message.content.array_records[messages.ARRAYS].to_torch_state_dict())
        run = messages.asked(message, messages.EXPERIMENT)
        assert run
        state = ClientState(folder, run, f"partition-{partition}")
        return Job(config, message, model, [(x, y)], len(x), 1, half_squared_error, torch.device("cpu"), 0, state)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return method.client(job(message, context))

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        asked = job(message, context)
        further = method.evaluate(asked) if method.evaluate else {}
        return messages.metrics_reply(message, asked.metrics | further)

    @app.query(messages.PARTITION_ACTION)
    def partition(message: Message, context: Context) -> Message:
        return messages.partition_reply(message, context)

    return app


def after_each_round(app: ClientApp, change: Callable[[int, int, Message], None]) -> ClientApp:
    """The same clients; ``change(round, partition, reply)`` is called with each training reply."""
    changed = ClientApp()

    @changed.train()
    def train(message: Message, context: Context) -> Message:
        reply = app(message, context)
        change(messages.server_round_of(message), messages.partition_of(context)[0], reply)
        return reply

    return changed


def spoiled(app: ClientApp, bad: Collection[tuple[int, int]], spoil: Spoil) -> ClientApp:
    """The replies of these (round, partition) are spoiled."""

    def change(number: int, partition: int, reply: Message) -> None:
        if (number, partition) in bad:
            spoil(reply)

    return after_each_round(app, change)


def _arrays(value: torch.Tensor, key: str = "weight") -> Spoil:
    def spoil(reply: Message) -> None:
        reply.content[messages.ARRAYS] = ArrayRecord({key: value})

    return spoil


SPOILS: dict[str, Spoil] = {
    "NaN": _arrays(torch.tensor([[float("nan")]], dtype=torch.float64)),
    "wrong shape": _arrays(torch.zeros(1, 2, dtype=torch.float64)),
    "missing tensor": _arrays(torch.zeros(1, 1, dtype=torch.float64), "other"),
}


def weight_after(method: Method, config: Config, app: ClientApp, rounds: int, start: float = 0.0) -> float:
    """w of the global model, two clients."""
    return weight_of(federate(app, method.strategy(config), weight(start), 2, rounds=rounds, seed=0))


def weight_of(result: Result) -> float:
    return float(result.arrays.to_torch_state_dict()["weight"])
