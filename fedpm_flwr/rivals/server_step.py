"""A server that steps by its clients' gradients, and by what else they say of their losses at θ."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from torch import Tensor

from ..guarded import Guarded
from ..replies import Update
from .vectors import check_side, from_vector, to_vector


@dataclass(frozen=True, eq=False)
class Slope(Update):
    """A reply with ∇fᵢ(θ), [d]."""

    gradient: Tensor


class ServerStep(Guarded):
    """θ⁺ = θ − η_s B⁻¹ g,  g = Σ wᵢ ∇fᵢ(θ),  wᵢ = nᵢ / Σ nⱼ over the clients that replied.

    The models in the replies are θ as it was sent: clients do not train. What is not floating point
    in them is averaged as in FedAvg. ``direction`` makes B⁻¹ g.

    Args:
        server_learning_rate: η_s.
        max_factor_side: the most parameters that there may be.
        strategy: what ``Guarded`` takes.
    """

    def __init__(self, *, server_learning_rate: float = 1.0, max_factor_side: int = 8192, **strategy: Any) -> None:
        super().__init__(**strategy)
        self.server_learning_rate = server_learning_rate
        self.max_factor_side = max_factor_side
        self._stepped: list[tuple[Message, Update]] = []

    @property
    def parameters(self) -> Tensor:
        """θ, [d]."""
        return to_vector(self._theta)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As FedAvg, which sends θ.

        Raises:
            ValueError: the model has too many parameters.
        """
        requests = super().configure_train(server_round, arrays, config, grid)
        check_side(len(self.parameters), self.max_factor_side)
        return requests

    def combine(
        self, server_round: int, usable: Iterable[tuple[Message, Update]]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Take the step.

        Raises:
            CurvatureError: B cannot be inverted.
            ValueError: the new model is not finite.
        """
        kept = list(usable)
        averaged, metrics = super().combine(server_round, kept)
        if averaged is None:
            return None, metrics
        step = self.server_learning_rate * self.direction(server_round, kept)
        moved = from_vector(self.parameters - step, averaged.to_torch_state_dict())
        self._stepped = kept
        return self._as_sent(ArrayRecord(moved)), metrics

    @abstractmethod
    def direction(self, server_round: int, kept: Sequence[tuple[Message, Update]]) -> Tensor:
        """B⁻¹ g, [d]."""

    def accepted(self, server_round: int) -> None:
        """The step counts."""
        super().accepted(server_round)
        self.step_taken(server_round, self._stepped)

    def step_taken(self, server_round: int, kept: Sequence[tuple[Message, Update]]) -> None:
        """What is to do after the step, if anything."""


def mean_gradient(kept: Sequence[tuple[Message, Update]]) -> Tensor:
    """g, [d]."""
    total = sum(update.weight for _, update in kept)
    slopes = [(update.gradient, update.weight) for _, update in kept if isinstance(update, Slope)]
    return torch.stack([gradient * (examples / total) for gradient, examples in slopes]).sum(0)
