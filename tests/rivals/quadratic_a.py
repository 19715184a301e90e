"""Two clients with a quadratic each, and the application on a few digits, for tests of one method at a time.

Client 0 has one example (x, y) = (1, 1), client 1 three of (2, −2). With ½(xθ − y)²:

    f₀ = ½(θ − 1)², g₀ = θ − 1, n₀ = 1;      f₁ = 2(θ + 1)², g₁ = 4(θ + 1), n₁ = 3

All start from θ = 0. Clients weighed by examples count ¼ and ¾.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from torch import Tensor, nn

import client_app
import server_app
from fedpm_flwr import messages
from fedpm_flwr.config import Config
from fedpm_flwr.inline import run_inline
from fedpm_flwr.method import Job, Method
from fedpm_flwr.reproducible import PartitionOrderedGrid
from fedpm_flwr.state import ClientState
from fedpm_flwr.training import Loss

from ..apps import Data, federate, half_squared_error

Spoil = Callable[[int, int, Message], None]
"""Of (round, partition, reply): changes the reply on its way."""

Client = Callable[[Message, Context], Message]
Row = dict[str, float]


def two_quadratics(partition: int) -> tuple[Tensor, Tensor]:
    x, y, examples = ((1.0, 1.0, 1), (2.0, -2.0, 3))[partition]
    return torch.full((examples, 1), x).double(), torch.full((examples, 1), y).double()


def scalar() -> nn.Module:
    """θ = 0."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    return model


def app_of(
    method: Method,
    config: Config,
    folder: Path,
    *,
    data: Data = two_quadratics,
    make_model: Callable[[], nn.Module] = scalar,
    loss: Loss = half_squared_error,
    spoil: Spoil = lambda number, partition, reply: None,
) -> ClientApp:
    """The method's client, on all its data in each step; its state is under ``folder``."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition, number = messages.partition_of(context)[0], messages.server_round_of(message)
        batch = data(partition)
        model = make_model()
        model.load_state_dict(message.content.array_records[messages.ARRAYS].to_torch_state_dict())
        run = messages.asked(message, messages.EXPERIMENT) or "unnamed"
        job = Job(
            config=config,
            request=message,
            model=model,
            batches=[batch],
            examples=len(batch[0]),
            steps_an_epoch=1,
            loss=loss,
            device=torch.device("cpu"),
            seed=config.seed,
            state=ClientState(folder, run, f"partition-{partition}"),
        )
        reply = method.client(job)
        spoil(number, partition, reply)
        return reply

    @app.query(messages.PARTITION_ACTION)
    def partition(message: Message, context: Context) -> Message:
        return messages.partition_reply(message, context)

    return app


def ordered(grid: Grid) -> Grid:
    return PartitionOrderedGrid(grid, 0)


def theta_after(
    method: Method,
    config: Config,
    folder: Path,
    rounds: int = 2,
    *,
    nodes: int = 2,
    data: Data = two_quadratics,
    spoil: Spoil = lambda number, partition, reply: None,
) -> float:
    """θ after so many rounds through the method's own strategy."""
    app = app_of(method, config, folder, data=data, spoil=spoil)
    result = federate(app, method.strategy(config), scalar(), nodes, rounds, ordered)
    (weight,) = result.arrays.to_torch_state_dict().values()
    assert weight.dtype == torch.float64
    return float(weight)


def drop(number: int, partition: int, reply: Message) -> None:
    """Client 1 gives nothing in round 2."""
    if (number, partition) == (2, 1):
        raise RuntimeError("nothing from here")


def broken_arrays(how: str) -> Spoil:
    """Client 1's model in round 2 has another shape, is not finite, or is not there."""
    broken = {
        "shape": {"weight": torch.zeros(2, 1).double()},
        "nan": {"weight": torch.full((1, 1), torch.nan).double()},
        "missing": {"other": torch.zeros(1, 1).double()},
    }[how]

    def spoil(number: int, partition: int, reply: Message) -> None:
        if (number, partition) == (2, 1):
            arrays = {key: Array(value.numpy()) for key, value in broken.items()}
            reply.content[messages.ARRAYS] = ArrayRecord(arrays)

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


BROKEN = {
    "shape": "array 'weight' is",
    "nan": "array 'weight' is not finite",
    "missing": "its arrays are not those",
}
"""What ``broken_arrays`` does, and what is said of it."""


def digits(folder: Path, settings: Mapping[str, object], client: Client = client_app.app) -> list[Row]:
    """The rows of a short run of the application on digits, by four nodes."""
    given = {"num-server-rounds": 3, "alpha": 10.0, "model": "mlp", "output": str(folder), **settings}
    config = Config.from_run_config({**given, "state-folder": str(folder / "state")})
    # all that it does with a client is to call it
    run_inline(server_app.app, client, 4, config.to_run_config())  # type: ignore[arg-type]
    rows: list[Row] = json.loads((folder / "metrics.json").read_text())
    return rows


def check_learns(folder: Path, settings: Mapping[str, object]) -> None:
    """The test loss falls in three rounds of all four clients, and in three of two of them."""
    for name, fraction in (("all", 1.0), ("half", 0.5)):
        rows = digits(folder / name, {**settings, "fraction-train": fraction})
        assert [row["clients"] for row in rows[1:]] == [4 * fraction] * 3
        assert rows[-1]["test-loss"] < rows[0]["test-loss"] - 0.02
