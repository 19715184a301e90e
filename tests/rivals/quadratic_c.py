"""Clients with quadratic losses, through a real ClientApp: fᵢ(w) = ½ (xᵢᵀw − yᵢ)² averaged over rows."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from torch import Tensor, nn

from fedpm_flwr import messages
from fedpm_flwr.config import Config
from fedpm_flwr.method import Job, Method
from fedpm_flwr.reproducible import PartitionOrderedGrid
from fedpm_flwr.state import ClientState

from ..apps import federate, half_squared_error

Data = tuple[Tensor, Tensor]
Spoil = Callable[[Job, int, Message], Message]
"""Makes another reply of a job's, by partition."""


def rows(inputs: Sequence[Sequence[float]], targets: Sequence[float], times: int = 1) -> Data:
    """A client's examples, each so many times: nᵢ without another loss."""
    x = torch.tensor(inputs, dtype=torch.float64).repeat(times, 1)
    return x, torch.tensor(targets, dtype=torch.float64).repeat(times)[:, None]


def random_rows(seed: int) -> Data:
    """12 + 4 · seed examples of two numbers, drawn; with the seed grow steepness and distance from 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12 + 4 * seed, 2, dtype=torch.float64, generator=generator) * (1 + seed / 4)
    noise = torch.randn(len(x), 1, dtype=torch.float64, generator=generator)
    return x, x.sum(1, keepdim=True) + 0.5 * noise + seed / 2


def optimum(data: Sequence[Data]) -> Tensor:
    """The least squares solution of all clients' rows, [d]."""
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    solution: Tensor = torch.linalg.lstsq(x, y).solution[:, 0]
    return solution


def client(
    method: Method, data: Sequence[Data], config: Config, folder: Path, spoil: Spoil | None = None
) -> ClientApp:
    """Each partition with its own of ``data``, whose state is in ``folder``."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition = messages.partition_of(context)[0]
        x, y = data[partition]
        model = nn.Linear(x.shape[1], 1, bias=False).double()
        model.load_state_dict(message.content.array_records[messages.ARRAYS].to_torch_state_dict())
        run = messages.asked(message, messages.EXPERIMENT)
        assert run is not None
        job = Job(
            config=config,
            request=message,
            model=model,
            batches=[(x, y)],
            examples=len(x),
            steps_an_epoch=1,
            loss=half_squared_error,
            device=torch.device("cpu"),
            seed=0,
            state=ClientState(folder, run, f"partition-{partition}"),
        )
        reply = method.client(job)
        return spoil(job, partition, reply) if spoil else reply

    @app.query(messages.PARTITION_ACTION)
    def partition(message: Message, context: Context) -> Message:
        return messages.partition_reply(message, context)

    return app


def ordered(grid: Grid) -> Grid:
    return PartitionOrderedGrid(grid, 0)


def train(
    method: Method,
    data: Sequence[Data],
    folder: Path,
    rounds: int = 1,
    spoil: Spoil | None = None,
    **settings: Any,
) -> tuple[Tensor, Result]:
    """w [d] after these rounds from w = 0, and all that Flower says; ``settings`` are Config's."""
    config = Config(**{"dtype": "float64", "min_available_nodes": 1, **settings})
    app = client(method, data, config, folder, spoil)
    model = nn.Linear(data[0][0].shape[1], 1, bias=False).double()
    nn.init.zeros_(model.weight)
    result = federate(app, method.strategy(config), model, len(data), rounds, wrap=ordered, seed=3)
    state = result.arrays.to_torch_state_dict() if result.arrays else model.state_dict()
    return state["weight"][0], result


def spoilt(reply: Message, name: str) -> dict[str, RecordDict]:
    """Replies that cannot be used, for the tensor of this name, by what is said of them."""
    tensor = messages.read_tensors(reply.content)[name]

    def content(**tensors: Tensor) -> RecordDict:
        return RecordDict({**reply.content, messages.EXTRA: messages.tensors_record(tensors)})

    metrics = reply.content.metric_records[messages.METRICS]
    return {
        f"its 'extra' tensor '{name}' is [{len(tensor) + 1}], not [{len(tensor)}]": content(
            **{name: torch.cat([tensor, tensor[:1]])}
        ),
        "is not finite floating-point numbers": content(**{name: tensor * torch.nan}),
        f"are not those asked for; missing or extra: {', '.join(sorted([name, 'other']))}": content(other=tensor),
        "it holds no 'extra' tensors": RecordDict({messages.METRICS: metrics}),
        "it holds 0 MetricRecords, not 1": RecordDict({messages.ARRAYS: ArrayRecord()}),
        "'num-examples' is nan": RecordDict(
            {**reply.content, messages.METRICS: MetricRecord({"num-examples": torch.nan})}
        ),
    }


BAD = 6
"""How many kinds ``spoilt`` makes."""


def spoiling(name: str, kind: int, which: Callable[[Job, int], bool], said: list[str]) -> Spoil:
    """Sends the ``kind``-th bad reply in place of those that ``which`` picks; notes what has to be said."""

    def spoil(job: Job, partition: int, reply: Message) -> Message:
        if not which(job, partition):
            return reply
        reason, content = list(spoilt(reply, name).items())[kind]
        said.append(reason)
        return Message(content, reply_to=job.request)

    return spoil
