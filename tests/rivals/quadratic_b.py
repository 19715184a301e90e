"""A method's real client and strategy on small problems, with the tensors that travel kept to look at."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Result
from torch import Tensor, nn

from fedpm_flwr import messages
from fedpm_flwr.algorithms import get_algorithm
from fedpm_flwr.config import Config
from fedpm_flwr.guarded import Guarded
from fedpm_flwr.method import Job
from fedpm_flwr.reproducible import PartitionOrderedGrid
from fedpm_flwr.state import ClientState
from fedpm_flwr.training import Loss, derive_seed

from ..apps import Data, federate, half_squared_error

Tamper = Callable[[Job, Message], Message | None]
"""Sees each request's job and the reply to it, and may put another in its place."""


def make_linear(*weights: float) -> Callable[[], nn.Module]:
    """x ↦ θᵀx in float64, from this θ."""

    def make() -> nn.Module:
        model = nn.Linear(len(weights), 1, bias=False).double()
        model.weight.data = torch.tensor([weights], dtype=torch.float64)
        return model

    return make


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

    def run(self, config: Config, rounds: int, tamper: Tamper = lambda job, reply: None) -> Result:
        self.strategy = get_algorithm(config.algorithm).strategy(config)
        self.thetas = []
        result = federate(
            self._app(config, tamper),
            self.strategy,
            self.make_model(),
            self.nodes,
            rounds,
            wrap=lambda grid: PartitionOrderedGrid(grid, config.seed),
        )
        if result.arrays:
            self.thetas.append(_theta(result.arrays.to_torch_state_dict()))
        return result

    def _app(self, config: Config, tamper: Tamper) -> ClientApp:
        app = ClientApp()

        @app.train()
        def train(message: Message, context: Context) -> Message:
            partition, _ = messages.partition_of(context)
            model = self.make_model()
            model.load_state_dict(message.content.array_records[messages.ARRAYS].to_torch_state_dict())
            number = messages.server_round_of(message)
            if len(self.thetas) < number:
                self.thetas.append(_theta(model.state_dict()))
            x, y = self.data(partition)
            experiment = messages.asked(message, messages.EXPERIMENT) or ""
            job = Job(
                config=config,
                request=message,
                model=model,
                batches=[(x, y)],
                examples=len(x),
                steps_an_epoch=1,
                loss=self.loss,
                device=torch.device("cpu"),
                seed=derive_seed(config.seed, number, partition),
                state=ClientState(self.folder, experiment, f"partition-{partition}"),
            )
            reply = get_algorithm(config.algorithm).client(job)
            return tamper(job, reply) or reply

        @app.query(messages.PARTITION_ACTION)
        def partition(message: Message, context: Context) -> Message:
            return messages.partition_reply(message, context)

        return app


def with_tensors(reply: Message, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Message:
    """The reply with other tensors beside its model."""
    tensors = change(messages.read_tensors(reply.content))
    reply.content[messages.EXTRA] = messages.tensors_record(tensors) if tensors else ConfigRecord()
    return reply


def softmax_data(partition: int) -> tuple[Tensor, Tensor]:
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


def _theta(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.reshape(len(value), -1) for value in state.values()], dim=1).flatten()
