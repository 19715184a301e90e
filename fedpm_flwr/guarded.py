"""Rounds that go on without the replies that cannot be used: for every strategy derived from FedAvg."""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from . import messages
from .messages import ReplyError, Update
from .report import PREFIX

_log = logging.getLogger("flwr")


class TooFewRepliesError(RuntimeError):
    """Too few usable replies came in for too many rounds in a row."""


class Guarded(FedAvg):
    """FedAvg that leaves out what it cannot use; before another strategy, as a mixin, that strategy.

    ``class GuardedFedAdam(Guarded, FedAdam): ...`` is FedAdam with rounds that go on.

    A reply that cannot be used is left out with one warning that names its node, its partition
    (under a ``PartitionOrderedGrid``) and the reason. So are metrics that not all replies have in the
    same form. A round with fewer than ``min_replies`` usable replies, or whose result is not finite,
    leaves the model as it is.

    Args:
        min_replies: usable training replies without which a round does not count.
        max_failed_rounds: after so many rounds in a row that do not count, ``TooFewRepliesError`` is raised.
        strategy: what the guarded strategy takes.

    Raises:
        ValueError: naming the argument and what is allowed.
    """

    def __init__(self, *, min_replies: int = 1, max_failed_rounds: int = 3, **strategy: Any) -> None:
        super().__init__(**strategy)
        for name, value in (("min_replies", min_replies), ("max_failed_rounds", max_failed_rounds)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, not {value}")
        self.min_replies = min_replies
        self.max_failed_rounds = max_failed_rounds
        self.failed_rounds = 0
        """How many rounds in a row have not counted."""
        self._theta: dict[str, Tensor] = {}
        self._partition_of: Callable[[int], int | None] = _unknown

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the guarded strategy, which sends θ."""
        self._theta = arrays.to_torch_state_dict()
        self._partition_of = getattr(grid, "partition_of", _unknown)
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """As the guarded strategy, from the usable replies.

        Raises:
            TooFewRepliesError: see the class.
        """
        kept = [
            _with_content(reply, _content(reply, update)) for reply, update in self.usable(server_round, replies)
        ]
        if self.failed_rounds:
            return None, None
        arrays, metrics = super().aggregate_train(server_round, with_common_metrics(kept))
        return arrays and self._as_sent(server_round, arrays), metrics

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """As the guarded strategy, from the usable replies."""
        kept = []
        for reply in replies:
            try:
                metrics = messages.read_metrics(reply, self.weighted_by_key)
            except ReplyError as error:
                self._warn(server_round, "evaluation", reply, error)
                continue
            kept.append(_with_content(reply, RecordDict({messages.METRICS: metrics})))
        return super().aggregate_evaluate(server_round, with_common_metrics(kept)) if kept else None

    def usable(self, server_round: int, replies: Iterable[Message]) -> Iterator[tuple[Message, Update]]:
        """The replies that can be used, one at a time; sets ``failed_rounds`` when the last has been given.

        Raises:
            TooFewRepliesError: see the class.
        """
        used = 0
        for reply in replies:
            try:
                update = self.read(reply)
            except ReplyError as error:
                self._warn(server_round, "reply", reply, error)
                continue
            used += 1
            yield reply, update
        self._count(server_round, used)

    def read(self, reply: Message) -> Update:
        """The checked update in a training reply.

        Raises:
            ReplyError: the reply cannot be used.
        """
        return messages.read_update(reply, self._theta, weighted_by=self.weighted_by_key)

    def _as_sent(self, server_round: int, arrays: ArrayRecord) -> ArrayRecord | None:
        """The aggregate in θ's dtypes (averaging makes floats of integers), or None if it is not finite."""
        state = {}
        for key, value in arrays.to_torch_state_dict().items():
            dtype = self._theta[key].dtype
            state[key] = (value if dtype.is_floating_point else value.round()).to(dtype)
            if not torch.isfinite(state[key]).all():
                _log.error("%sround %d: the model stays as it was: %r is not finite", PREFIX, server_round, key)
                return None
        return ArrayRecord(state)

    def _count(self, server_round: int, used: int) -> None:
        if used >= self.min_replies:
            self.failed_rounds = 0
            return
        self.failed_rounds += 1
        state = f"round {server_round}: {used} usable replies, but min-replies is {self.min_replies}"
        if self.failed_rounds >= self.max_failed_rounds:
            raise TooFewRepliesError(f"{state}; that was round {self.failed_rounds} in a row, and the run stops")
        _log.warning("%s%s: the model stays as it was", PREFIX, state)

    def _warn(self, server_round: int, what: str, reply: Message, error: ReplyError) -> None:
        node = reply.metadata.src_node_id
        partition = self._partition_of(node)
        place = f"node {node}" if partition is None else f"node {node} (partition {partition})"
        _log.warning("%sround %d: left out the %s of %s: %s", PREFIX, server_round, what, place, error)


def _content(reply: Message, update: Update) -> RecordDict:
    """A reply as a stock strategy expects it: one name for each record, θ's dtypes."""
    (metrics,) = reply.content.metric_records.values()
    return RecordDict({messages.ARRAYS: ArrayRecord(update.state), messages.METRICS: metrics})


def with_common_metrics(replies: list[Message]) -> list[Message]:
    """The replies with the metrics that all of them have in the same form, and no others."""
    contents = messages.with_common_metrics([reply.content for reply in replies])
    return [_with_content(reply, content) for reply, content in zip(replies, contents, strict=True)]


def _with_content(reply: Message, content: RecordDict) -> Message:
    changed = copy.copy(reply)
    changed.content = content
    return changed


def _unknown(node: int) -> int | None:
    return None
