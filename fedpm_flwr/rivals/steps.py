"""What strategies share that tell their clients the last step of the global model."""

from collections.abc import Iterable
from typing import Any, ClassVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from torch import Tensor

from .. import messages
from ..guarded import Guarded
from ..replies import Update
from ..rewriting import with_extra


class StepTeller(Guarded):
    """θ⁺ = θ + η_s s,  s = Σ wᵢ (θᵢ − θ),  wᵢ = nᵢ / Σ nⱼ; with the next requests goes s, by parameter name.

    A round that fails leaves θ and s as they were. s has an entry for each floating-point entry of θ's
    state. In a run's first round there is none, and none after it if ``tells`` is False.

    Args:
        server_learning_rate: η_s.
        tells: whether clients are sent s.
        strategy: what ``Guarded`` takes.
    """

    memory: ClassVar[tuple[str, ...]] = ("_step",)

    def __init__(self, *, server_learning_rate: float = 1.0, tells: bool = True, **strategy: Any) -> None:
        super().__init__(**strategy)
        self._rate, self._tells = server_learning_rate, tells
        self._step: dict[str, Tensor] = {}
        self._next_step: dict[str, Tensor] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """θ, and s of the last round that gave a new model."""
        if server_round == 1:
            self._step = {}
        requests = super().configure_train(server_round, arrays, config, grid)
        record = messages.tensors_record(self._step) if self._tells and self._step else ConfigRecord()
        return [with_extra(request, record) for request in requests]

    def accepted(self, server_round: int) -> None:
        """s is that of this round."""
        super().accepted(server_round)
        self._step = self._next_step

    def combine(
        self, server_round: int, usable: Iterable[tuple[Message, Update]]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """θ⁺.

        Raises:
            Exception: as the guarded strategy, or the new model is not finite.
        """
        arrays, metrics = super().combine(server_round, usable)
        if arrays is None:
            return None, metrics
        mean = arrays.to_torch_state_dict()
        old = {key: value for key, value in self._theta.items() if value.is_floating_point()}
        self._next_step = {key: mean[key] - value for key, value in old.items()}
        if self._rate == 1:  # to the bit what FedAvg makes
            return arrays, metrics
        moved = {key: value + self._rate * self._next_step[key] for key, value in old.items()}
        return self._as_sent(ArrayRecord({**mean, **moved})), metrics
