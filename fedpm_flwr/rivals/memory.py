"""Strategies that keep something from round to round, such as momentum."""

from collections.abc import Iterable
from typing import ClassVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from ..guarded import Guarded


class Remembering(Guarded):
    """Guarded, with what is kept between rounds as it was after a round that fails, and new in a new run.

    To be put before the strategy that keeps it: ``class GuardedFedAvgM(Remembering, FedAvgM)``.
    """

    memory: ClassVar[tuple[str, ...]] = ()
    """As Guarded's: set anew in each round, never changed in place; None at the start."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the guarded strategy; round 1 begins with nothing kept."""
        if server_round == 1:
            for name in self.memory:
                setattr(self, name, None)
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """As the guarded strategy; a round without a new model leaves no trace."""
        before = {name: getattr(self, name) for name in self.memory}
        arrays, metrics = super().aggregate_train(server_round, replies)
        if arrays is None:
            for name, value in before.items():
                setattr(self, name, value)
        return arrays, metrics
