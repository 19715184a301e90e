"""Rounds that go on without the replies that cannot be used: for every strategy derived from FedAvg."""

import logging
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result
from torch import Tensor

from . import messages
from .config import WEIGHTINGS
from .events import event
from .grids import StreamingGrid
from .replies import ReplyError, Update, read_metrics, read_update, with_common_metrics
from .report import PREFIX, one_line
from .rewriting import canonical, weighing_alike, with_content, with_extra, without_arrays
from .state import ClientState

_log = logging.getLogger("flwr")
_Read = TypeVar("_Read")
_MetricsFunction = Callable[[list[RecordDict], str], MetricRecord]
_LOST = MetricRecord()
_MEMORY = ("experiment", "forked_from", "failed_rounds")


class FailedRoundsError(RuntimeError):
    """Too many rounds in a row gave no new model."""


class Guarded(FedAvg):
    """FedAvg that leaves out what it cannot use; before another strategy, as a mixin, that strategy.

    ``class GuardedFedAdam(Guarded, FedAdam): ...`` is FedAdam with rounds that go on.

    A reply that cannot be used is left out with one warning that names its node, its partition
    (under a ``PartitionOrderedGrid``) and the reason. So are metrics that not all replies have in the
    same form. A round fails, and leaves the model as it is, if fewer than ``min_replies`` replies can
    be used, if the strategy raises, or if its result is not finite. (What a client says within
    finite numbers is believed: against lies there are Krum and its like.)

    Args:
        min_replies: usable training replies without which a round fails.
        max_failed_rounds: after so many failed rounds in a row, ``FailedRoundsError`` is raised.
        weighting: how much a client counts in the model. ``num-examples``: wᵢ = nᵢ/Σnⱼ, nᵢ what is under
            ``weighted_by_key``; ``uniform``: wᵢ = 1/N, of N usable replies. Metrics are weighed by nᵢ either way.
        **strategy: what the guarded strategy takes.

    Raises:
        ValueError: naming the argument and what is allowed.
    """

    memory: ClassVar[tuple[str, ...]] = ()
    """The attributes, beside Guarded's own, that later rounds need and a checkpoint has to hold."""

    def __init__(
        self,
        *,
        min_replies: int = 1,
        max_failed_rounds: int = 3,
        weighting: str = "num-examples",
        **strategy: Any,
    ) -> None:
        super().__init__(**strategy)
        for name, value in (("min_replies", min_replies), ("max_failed_rounds", max_failed_rounds)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, not {value}")
        if weighting not in WEIGHTINGS:
            raise ValueError(f"unknown weighting {weighting!r}; allowed: {', '.join(WEIGHTINGS)}")
        self.weighting = weighting
        self.train_metrics_aggr_fn = _surviving(self.train_metrics_aggr_fn)
        self.evaluate_metrics_aggr_fn = _surviving(self.evaluate_metrics_aggr_fn)
        self.min_replies = min_replies
        self.max_failed_rounds = max_failed_rounds
        self.failed_rounds = 0
        """How many rounds in a row have failed."""
        self._theta: dict[str, Tensor] = {}
        self.experiment = ""
        """A name of the run, by which clients keep their state; another one in every run."""
        self.forked_from: list[tuple[str, int]] = []
        """The run whose checkpoint this one began at, and its round; then that run's own origin, and so on. To
        clients a run that is taken up again is another one: what they did after the checkpoint does not count."""
        self.checkpoints: list[int] | None = None
        """The rounds that the run may be taken up after again: clients keep their states of then. None: never."""
        self.state_folder: Path | None = None
        """Of what this server itself keeps of its clients (``state_of``); None: as for ``ClientState``. Under
        ``Checkpointed`` it is with the checkpoints."""
        self.timeout: float | None = 3600.0
        """Seconds that an exchange of messages may take: Flower's own for a round, or as ``start`` is given."""
        self._asked = False
        self._partition_of: Callable[[int], int | None] = _unknown

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """As the guarded strategy, with replies that come one at a time (``as_received``).

        Raises:
            FailedRoundsError: too many rounds in a row have failed, or all of a short run's.
        """
        self.timeout = timeout
        result = super().start(
            self.as_received(grid), initial_arrays, num_rounds, timeout, train_config, evaluate_config, evaluate_fn
        )
        self.check_trained(result)
        return result

    def check_trained(self, result: Result) -> None:
        """An empty model is no result.

        Raises:
            FailedRoundsError: no round gave one.
        """
        if self.failed_rounds and not result.arrays:
            raise FailedRoundsError("no round gave a new model; the log says what was wrong with the replies")

    def as_received(self, grid: Grid) -> StreamingGrid:
        """The Grid that gives replies as this strategy goes through them.

        Where a subclass from outside this library has an ``aggregate_train`` or ``aggregate_evaluate`` of its
        own, that may go through them as through Flower's list: all at once.
        """
        own = [
            next(cls for cls in type(self).__mro__ if name in vars(cls)).__module__
            for name in ("aggregate_train", "aggregate_evaluate")
        ]
        return StreamingGrid(grid, at_once=not all(module.startswith(f"{__package__}.") for module in own))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the guarded strategy, which sends θ."""
        self._theta = arrays.to_torch_state_dict()
        self._partition_of = getattr(grid, "partition_of", _unknown)
        if server_round == 1 or not self.experiment:
            self.experiment, self.forked_from = uuid.uuid4().hex, []
        requests = list(super().configure_train(server_round, arrays, self._named(config), grid))
        self._asked = bool(requests)
        return requests

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What ``combine`` makes of the usable replies, or nothing if the round fails.

        Raises:
            FailedRoundsError: see the class.
            RuntimeError: replies have come to requests that are not of ``configure_train`` here.
        """
        if not self._asked:  # as with fraction_train=0
            for _ in replies:
                raise RuntimeError(
                    f"configure_train of {type(self).__name__} does not call super().configure_train(...), "
                    "which notes what is sent: change the messages that it gives"
                )
            return None, None
        self._asked = False
        usable = _Counted(self.usable(server_round, replies, self.read))
        try:
            arrays, metrics = self.combine(server_round, usable)
            failure = "" if arrays is not None else "the strategy gave no model"
        except Exception as error:  # whatever a strategy stumbles over, the model is still there
            arrays, metrics, failure = None, None, f"{type(error).__name__}: {error}"
        if usable.count < self.min_replies:
            failure = f"{usable.count} usable replies, but min-replies is {self.min_replies}"
        if failure:
            self._fail(f"round {server_round}: {failure}")
            return None, None
        self.failed_rounds = 0
        self.accepted(server_round)
        return arrays, None if metrics is _LOST else metrics

    def accepted(self, server_round: int) -> None:
        """Called when a round counts: the place, not ``combine``, to keep what later rounds need of it."""

    def combine(
        self, server_round: int, usable: Iterable[tuple[Message, Update]]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The new model and metrics, from the usable replies: here, as the guarded strategy makes them.

        Raises:
            Exception: of any kind, if there is no new model.
        """
        kept = _common([with_content(reply, canonical(reply, update.state)) for reply, update in usable])
        if self.weighting == "num-examples":
            arrays, metrics = super().aggregate_train(server_round, kept)
        else:
            arrays, _ = super().aggregate_train(server_round, weighing_alike(kept, self.weighted_by_key))
            metrics = self.train_metrics_aggr_fn([reply.content for reply in kept], self.weighted_by_key)
        return None if arrays is None else self._as_sent(arrays), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the guarded strategy; clients are told under which name they keep their state."""
        return super().configure_evaluate(server_round, arrays, self._named(config), grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """As the guarded strategy, from the usable replies."""
        kept = []
        for reply in replies:
            try:
                read_metrics(reply, self.weighted_by_key)
            except ReplyError as error:
                self._warn(server_round, "evaluation", reply, error)
                continue
            kept.append(with_content(reply, without_arrays(reply.content)))
        metrics = super().aggregate_evaluate(server_round, _common(kept))
        return None if metrics is _LOST else metrics

    def remembered(self) -> dict[str, Any]:
        """What later rounds need: numbers, text, bytes, tensors, Flower's records, and lists and dicts of them."""
        return {name: getattr(self, name) for name in (*_MEMORY, *self.memory)}

    def recall(self, remembered: Mapping[str, Any]) -> None:
        """Go on from what another strategy of this kind has remembered.

        Raises:
            ValueError: it was of another kind.
        """
        if set(remembered) != set(self.remembered()):
            raise ValueError(f"it remembers {sorted(remembered)}, not {sorted(self.remembered())}")
        for name in (*_MEMORY, *self.memory):
            setattr(self, name, remembered[name])

    def client_of(self, node: int) -> int:
        """By what a client is known through the run: its partition, which outlives its node; else its node."""
        partition = self._partition_of(node)
        return node if partition is None else partition

    def state_of(self, client: int) -> ClientState:
        """What this server itself keeps of a client, on disk."""
        folder, run, checkpoints = self.state_folder, self.experiment, self.checkpoints or ()
        return ClientState(folder, run, f"server-{client}", checkpoints=checkpoints, forked_from=self.forked_from)

    def read(self, reply: Message) -> Update:
        """The checked update in a training reply.

        Raises:
            ReplyError: the reply cannot be used.
        """
        update = read_update(reply, self._theta, weighted_by=self.weighted_by_key)
        return replace(update, weight=self.weight_of(update.weight))

    def weight_in(self, reply: Message) -> float:
        """How much the client of a reply counts, before Σ wᵢ = 1.

        Raises:
            ReplyError: it does not say its number of examples.
        """
        examples = read_metrics(reply, self.weighted_by_key)[self.weighted_by_key]
        assert isinstance(examples, int | float)
        return self.weight_of(float(examples))

    def weight_of(self, num_examples: float) -> float:
        """How much a client with nᵢ examples counts, before Σ wᵢ = 1."""
        return num_examples if self.weighting == "num-examples" else 1.0

    def ask(
        self, server_round: int, grid: Grid, requests: Iterable[Message], phase: str, extra: Mapping[str, Tensor]
    ) -> Iterable[Message]:
        """One more exchange in a round, before or after that of the training requests, with the same nodes.

        The clients find ``phase`` under ``messages.PHASE`` in the config, and ``extra`` beside θ. What
        comes back is unchecked: read it by ``usable``.
        """
        record = messages.tensors_record(extra) if extra else ConfigRecord()
        asking = [with_extra(request, record, {messages.PHASE: phase}) for request in requests]
        return grid.send_and_receive(asking, timeout=self.timeout)

    def usable(
        self, server_round: int, replies: Iterable[Message], read: Callable[[Message], _Read]
    ) -> Iterator[tuple[Message, _Read]]:
        """The replies that ``read`` can read, with what it made of them; the others are left out and named."""
        for reply in replies:
            try:
                made = read(reply)
            except ReplyError as error:
                self._warn(server_round, "reply", reply, error)
            else:
                yield reply, made
                del made  # here and below: else it is still in memory while the next one is read
            del reply

    def _named(self, config: ConfigRecord) -> ConfigRecord:
        return messages.named(config, self.experiment or "unnamed", self.forked_from, self.checkpoints)

    def _as_sent(self, arrays: ArrayRecord) -> ArrayRecord:
        """The aggregate in θ's dtypes: averaging makes floats of integers."""
        state = {}
        for key, value in arrays.to_torch_state_dict().items():
            old = self._theta[key]
            state[key] = (value if old.is_floating_point() else value.round()).to(old.dtype)
            if not (torch.isfinite(state[key]) | (state[key] == old)).all():
                raise ValueError(f"the aggregated {key!r} is not finite")
        return ArrayRecord(state)

    def _fail(self, reason: str) -> None:
        self.failed_rounds += 1
        if self.failed_rounds >= self.max_failed_rounds:
            raise FailedRoundsError(
                f"{reason}; that was failed round {self.failed_rounds} in a row, and the run stops"
            )
        facts = event("failed-round", reason=reason)
        _log.warning("%s%s: the model stays as it was", PREFIX, reason, extra=facts)

    def _warn(self, server_round: int, what: str, reply: Message, error: ReplyError) -> None:
        node = reply.metadata.src_node_id
        partition = self._partition_of(node)
        place = f"node {node}" if partition is None else f"node {node} (partition {partition})"
        reason = one_line(error)
        facts = event("left-out", round=server_round, node=node, partition=partition, reason=reason)
        _log.warning(
            "%sround %d: left out the %s of %s: %s", PREFIX, server_round, what, place, reason, extra=facts
        )


def forked(remembered: Mapping[str, Any], server_round: int) -> dict[str, Any]:
    """What ``Guarded.remembered`` gave after a round, for a run that begins there."""
    origin = (remembered["experiment"], server_round)
    return {**remembered, "experiment": uuid.uuid4().hex, "forked_from": [origin, *remembered["forked_from"]]}


class _Counted:
    """An iterable that counts what it has given."""

    def __init__(self, items: Iterable[tuple[Message, Update]]) -> None:
        self._items = items
        self.count = 0

    def __iter__(self) -> Iterator[tuple[Message, Update]]:
        for item in self._items:
            self.count += 1
            yield item
            del item


def _common(replies: list[Message]) -> list[Message]:
    """The replies with the metrics that all of them have in the same form, and no others."""
    contents = with_common_metrics([reply.content for reply in replies])
    return [with_content(reply, content) for reply, content in zip(replies, contents, strict=True)]


def _surviving(aggregate: _MetricsFunction) -> _MetricsFunction:
    """The user's own function; where it fails, ``_LOST``: metrics are not worth losing a round for."""

    def function(contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
        try:
            return aggregate(contents, weighted_by_key)
        except Exception as error:
            _log.warning("%smetrics could not be aggregated: %r", PREFIX, error)
            return _LOST

    return function


def _unknown(node: int) -> int | None:
    return None
