"""A method's real client and strategy on small problems in float64, where its rounds can be done by hand.

Unless a test brings its own data, client 0 has one example (x, y) = (1, 1), client 1 three of (2, −2).
With ½(xθ − y)²:

    f₀ = ½(θ − 1)², g₀ = θ − 1, n₀ = 1;      f₁ = 2(θ + 1)², g₁ = 4(θ + 1), n₁ = 3

All start from θ = 0. Clients weighed by examples count ¼ and ¾.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Result
from torch import Tensor, nn

from fedpm_flwr import messages
from fedpm_flwr.algorithms import get_algorithm
from fedpm_flwr.config import Config
from fedpm_flwr.guarded import Guarded
from fedpm_flwr.method import Job, Method
from fedpm_flwr.replies import read_tensors
from fedpm_flwr.training import Loss

from ..apps import Data, federate, half_squared_error, ordered
from ..jobs import Examples, Spoil, app_of, untouched


def two_quadratics(partition: int) -> Examples:
    x, y, examples = ((1.0, 1.0, 1), (2.0, -2.0, 3))[partition]
    return rows([[x]], [y], examples)


def rows(inputs: Sequence[Sequence[float]], targets: Sequence[float], times: int = 1) -> Examples:
    """A client's examples, each so many times: nᵢ without another loss."""
    x = torch.tensor(inputs, dtype=torch.float64).repeat(times, 1)
    return x, torch.tensor(targets, dtype=torch.float64).repeat(times)[:, None]


def random_rows(seed: int) -> Examples:
    """12 + 4 · seed examples of two numbers, drawn; with the seed grow steepness and distance from 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12 + 4 * seed, 2, dtype=torch.float64, generator=generator) * (1 + seed / 4)
    noise = torch.randn(len(x), 1, dtype=torch.float64, generator=generator)
    return x, x.sum(1, keepdim=True) + 0.5 * noise + seed / 2


def optimum(data: Sequence[Examples]) -> Tensor:
    """The least squares solution of all clients' rows, [d]."""
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    solution: Tensor = torch.linalg.lstsq(x, y).solution[:, 0]
    return solution


def make_linear(*weights: float) -> Callable[[], nn.Module]:
    """x ↦ θᵀx in float64, from this θ."""

    def make() -> nn.Module:
        model = nn.Linear(len(weights), 1, bias=False).double()
        model.weight.data = torch.tensor([weights], dtype=torch.float64)
        return model

    return make


scalar = make_linear(0.0)


def theta_after(
    method: Method,
    config: Config,
    folder: Path,
    rounds: int = 2,
    *,
    start: float = 0.0,
    nodes: int = 2,
    data: Data = two_quadratics,
    spoil: Spoil = untouched,
) -> float:
    """θ after so many rounds through the method's own strategy."""
    app = app_of(method, config, folder, data=data, make_model=scalar, loss=half_squared_error, spoil=spoil)
    result = federate(app, method.strategy(config), make_linear(start)(), nodes, rounds, ordered)
    (weight,) = result.arrays.to_torch_state_dict().values()
    assert weight.dtype == torch.float64
    return float(weight)


def train(
    method: Method,
    data: Sequence[Examples],
    folder: Path,
    rounds: int = 1,
    spoil: Spoil = untouched,
    **settings: Any,
) -> tuple[Tensor, Result]:
    """θ [d] after these rounds from θ = 0, and all that Flower says; ``settings`` are Config's."""
    config = Config(**{"dtype": "float64", "min_available_nodes": 1, **settings})
    make_model = make_linear(*[0.0] * data[0][0].shape[1])
    app = app_of(
        method,
        config,
        folder,
        data=data.__getitem__,
        make_model=make_model,
        loss=half_squared_error,
        spoil=spoil,
    )
    model = make_model()
    result = federate(app, method.strategy(config), model, len(data), rounds, ordered)
    state = result.arrays.to_torch_state_dict() if result.arrays else model.state_dict()
    return state["weight"][0], result


class Problem:
    """Clients' data, a model and a loss; ``run`` takes rounds of an algorithm, ``thetas`` are the θ it passed."""

    def __init__(
        self,
        folder: Path,
        data: Data,
        make_model: Callable[[], nn.Module],
        loss: Loss = half_squared_error,
        nodes: int = 2,
    ) -> None:
        self.folder, self.data, self.make_model, self.loss, self.nodes = folder, data, make_model, loss, nodes
        self.thetas: list[Tensor] = []
        self.strategy: Guarded | None = None

    def config(self, algorithm: str, **settings: Any) -> Config:
        return Config(
            algorithm=algorithm,
            dtype="float64",
            state_folder=str(self.folder),
            min_available_nodes=self.nodes,
            **settings,
        )

    def run(self, config: Config, rounds: int, spoil: Spoil = untouched) -> Result:
        def noting(job: Job, partition: int, reply: Message) -> Message | None:
            if len(self.thetas) < job.server_round:
                self.thetas.append(_theta(job.request.content.array_records[messages.ARRAYS]))
            return spoil(job, partition, reply)

        method, self.thetas = get_algorithm(config.algorithm), []
        app = app_of(
            method, config, self.folder, data=self.data, make_model=self.make_model, loss=self.loss, spoil=noting
        )
        self.strategy = method.strategy(config)
        result = federate(app, self.strategy, self.make_model(), self.nodes, rounds, ordered)
        if result.arrays:
            self.thetas.append(_theta(result.arrays))
        return result


def _theta(arrays: ArrayRecord) -> Tensor:
    parts = arrays.to_torch_state_dict().values()
    return torch.cat([value.reshape(len(value), -1) for value in parts], dim=1).flatten()


def softmax_data(partition: int) -> Examples:
    """Three classes of noisy labels; clients of unequal size, inputs of different mean and scale."""
    generator = torch.Generator().manual_seed(partition)
    size = (12, 40, 25)[partition]
    x = torch.randn(size, 4, dtype=torch.float64, generator=generator) * (partition + 1) - partition
    noise = torch.randn(size, 4, dtype=torch.float64, generator=generator)
    return x, (x + 2 * (partition + 1) * noise)[:, :3].argmax(dim=1)


_SOFTMAX_DATA = tuple(torch.cat(parts) for parts in zip(*map(softmax_data, range(3)), strict=True))


def make_softmax() -> nn.Module:
    torch.manual_seed(3)
    model = nn.Linear(4, 3).double()
    nn.init.normal_(model.weight, std=0.01)  # so near to 0 that full Newton steps do not overshoot
    return model


def softmax_loss(theta: Tensor, decay: float) -> Tensor:
    """The loss of all clients' data together with weight decay, at θ [3 · 5], rows of [W | b]."""
    x, y = _SOFTMAX_DATA
    matrix = theta.reshape(3, 5)
    return F.cross_entropy(F.linear(x, matrix[:, :4], matrix[:, 4]), y) + decay / 2 * theta.square().sum()


def with_tensors(reply: Message, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Message:
    """The reply with other tensors beside its model."""
    tensors = change(read_tensors(reply.content))
    reply.content[messages.EXTRA] = messages.tensors_record(tensors) if tensors else ConfigRecord()
    return reply


_BROKEN_ARRAYS = {
    "shape": ({"weight": torch.zeros(2, 1).double()}, "array 'weight' is"),
    "nan": ({"weight": torch.full((1, 1), torch.nan).double()}, "array 'weight' is not finite"),
    "missing": ({"other": torch.zeros(1, 1).double()}, "its arrays are not those"),
}
BROKEN = {how: reason for how, (_, reason) in _BROKEN_ARRAYS.items()}
"""What ``broken_arrays`` does, and what is said of it."""


def drop(job: Job, partition: int, reply: Message) -> None:
    """Client 1 gives nothing in round 2."""
    if (job.server_round, partition) == (2, 1):
        raise RuntimeError("nothing from here")


def broken_arrays(how: str, *bad: tuple[int, int]) -> Spoil:
    """The model of these (round, partition), by default (2, 1), has another shape, is not finite, or not there."""

    def spoil(job: Job, partition: int, reply: Message) -> None:
        if (job.server_round, partition) in (bad or {(2, 1)}):
            reply.content[messages.ARRAYS] = ArrayRecord({**_BROKEN_ARRAYS[how][0]})

    return spoil


def check_left_out(
    method: Method, config: Config, folder: Path, spoil: Spoil, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The spoilt reply is named with this reason, and three rounds go as if it had never come."""
    found = theta_after(method, config, folder / "spoilt", 3, spoil=spoil)
    (line,) = [record.getMessage() for record in caplog.records if "left out the reply" in record.getMessage()]
    assert line.startswith("fedpm | round 2:")
    assert "(partition 1)" in line
    assert reason in line
    assert found == theta_after(method, config, folder / "dropped", 3, spoil=drop)


def spoilt(reply: Message, name: str) -> dict[str, RecordDict]:
    """Replies that cannot be used, for the tensor of this name, by what is said of them."""
    tensor = read_tensors(reply.content)[name]

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

    def spoil(job: Job, partition: int, reply: Message) -> Message | None:
        if not which(job, partition):
            return None
        reason, content = list(spoilt(reply, name).items())[kind]
        said.append(reason)
        return Message(content, reply_to=job.request)

    return spoil
