"""A strategy whose runs can be taken up again: a wrapper, as Flower's differential privacy has them.

    strategy = Checkpointed(FedPM(...), folder, every=5)
    strategy.start(grid=PartitionOrderedGrid(grid, seed), ...)

and, after the run broke off, the same in a new run with ``resume=folder``: its rounds go on where the newest
checkpoint stands, to the same models that an uninterrupted run ends with if the clients are the same.
"""

import logging
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Result,
    Strategy,
)

from . import messages
from .checkpoint import Checkpoint, Checkpoints
from .durable import copy_if_there
from .events import event
from .guarded import Guarded, forked
from .report import PREFIX
from .reproducible import PartitionOrderedGrid

_STOCK: dict[type[Strategy], tuple[str, ...]] = {
    **dict.fromkeys((FedAvg, FedProx, FedMedian, FedTrimmedAvg), ()),
    FedAvgM: ("current_arrays", "momentum_vector"),
    **dict.fromkeys((FedAdam, FedAdagrad, FedYogi), ("m_t", "v_t")),
}
"""What Flower's own strategies need from round to round."""
_STATES = "states"
"""In the folder of the checkpoints: what the server keeps of its clients."""
_log = logging.getLogger("flwr")


class Checkpointed(Strategy):
    """Does what another strategy does, writes checkpoints, and begins at one.

    A checkpoint that cannot be written costs a warning, not the run. The rounds of a run that was taken up
    again are numbered on from where it stood, for the strategy, ``evaluate_fn`` and the results; Flower's own log
    counts from 1.

    What clients keep between rounds has to be there still, in the same ``state-folder``. What the server itself
    keeps of them, as ``FedPM`` does their control variates, is with the checkpoints.

    Args:
        strategy: a ``Guarded`` one, or one of Flower's; of others only the model is kept, and a warning says so.
        folder: of the checkpoints.
        every: k, rounds between two of them; the last round has one in any case.
        keep: how many.
        resume: the folder of the checkpoints to begin at, this run's own or another's; None: begin at round 1.
        settings: of the run, by name; kept in the checkpoints.

    Raises:
        ValueError: naming the argument and what is allowed; the checkpoint is of another strategy; or
            ``folder`` holds the checkpoints of a run that is not taken up.
        FileNotFoundError: there is no checkpoint to begin at.
        OSError: the folder cannot be made or written to.
    """

    def __init__(
        self,
        strategy: Strategy,
        folder: Path | str,
        *,
        every: int = 1,
        keep: int = 3,
        resume: Path | str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be >= 1, not {every}")
        self.strategy = strategy
        if isinstance(strategy, Guarded):
            strategy.state_folder = Path(folder) / _STATES
        self._every, self._settings = every, dict(settings or {})
        if resume is not None and not Path(resume).is_dir():
            raise FileNotFoundError(f"there is no folder {resume} of checkpoints")
        self.resumed = None if resume is None else Checkpoints(Path(resume)).newest()
        """The checkpoint that the run begins at; None: it begins at round 1."""
        self._checkpoints = Checkpoints(Path(folder), keep)
        self._source = None if resume is None else Path(resume)
        is_own = resume is not None and Path(resume).resolve() == Path(folder).resolve()
        if not is_own and self._checkpoints.rounds():
            raise ValueError(f"{folder} holds checkpoints of a run: resume it, or begin another in another folder")
        if not isinstance(strategy, Guarded) and type(strategy) not in _STOCK:
            name = type(strategy).__name__
            _log.warning("%scheckpoints lack what %s keeps between rounds, which is unknown", PREFIX, name)
        self._offset = 0
        self._names: dict[str, Any] = {"experiment": uuid.uuid4().hex, "forked_from": []}
        """By which clients keep their state, as ``Guarded`` has them: of the other strategies, which have none."""
        self._result = Result()
        self._ordered: PartitionOrderedGrid | None = None
        if self.resumed is not None:
            self._recall(self.resumed)

    def summary(self) -> None:
        """As the strategy's, and where checkpoints go."""
        self.strategy.summary()
        _log.info("\t└──> Checkpoints: every %d rounds in %s", self._every, self._checkpoints.folder)
        if self._offset:
            _log.info("\t└──> Taken up after round %d: ROUND 1 is round %d", self._offset, self._offset + 1)

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
        """As Flower's; ``num_rounds`` are those of the whole run. The result has the metrics of all of them.

        Raises:
            ValueError: the model is not that of the checkpoint.
        """
        if self.resumed is not None:
            _check_same(self.resumed.arrays, initial_arrays)
            initial_arrays = self.resumed.arrays
            self._fetch_states()
        if isinstance(self.strategy, Guarded):
            self.strategy.timeout = timeout
        self._ordered = grid if isinstance(grid, PartitionOrderedGrid) else None
        if self._ordered is not None and self.resumed is not None:
            self._ordered.exchanges = self.resumed.exchanges

        def end_of_round(number: int, arrays: ArrayRecord) -> MetricRecord | None:
            if number == 0 and self._offset:
                return None
            server_round = number + self._offset
            metrics = evaluate_fn(server_round, arrays) if evaluate_fn is not None else None
            if metrics is not None:
                self._result.evaluate_metrics_serverapp[server_round] = metrics
            if server_round and (server_round % self._every == 0 or server_round == num_rounds):
                self._write(server_round, arrays)
            return metrics

        super().start(
            self.strategy.as_received(grid) if isinstance(self.strategy, Guarded) else grid,
            initial_arrays,
            max(num_rounds - self._offset, 0),
            timeout,
            train_config,
            evaluate_config,
            end_of_round,
        )
        if isinstance(self.strategy, Guarded):
            self.strategy.check_trained(self._result)
        return self._result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the strategy; clients are told which states may be asked for again."""
        if isinstance(self.strategy, Guarded):
            self.strategy.checkpoints = self._checkpoints.rounds()
        return self.strategy.configure_train(server_round + self._offset, arrays, self._named(config), grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """As the strategy."""
        arrays, metrics = self.strategy.aggregate_train(server_round + self._offset, replies)
        if arrays is not None:
            self._result.arrays = arrays
        if metrics is not None:
            self._result.train_metrics_clientapp[server_round + self._offset] = metrics
        return arrays, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the strategy."""
        return self.strategy.configure_evaluate(server_round + self._offset, arrays, self._named(config), grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """As the strategy."""
        metrics = self.strategy.aggregate_evaluate(server_round + self._offset, replies)
        if metrics is not None:
            self._result.evaluate_metrics_clientapp[server_round + self._offset] = metrics
        return metrics

    def _fetch_states(self) -> None:
        """Copy what the server keeps of its clients from where it has been, if that is another folder."""
        if not isinstance(self.strategy, Guarded) or self._source is None:
            return
        to = self._checkpoints.folder / _STATES
        for run, _ in self.strategy.forked_from:
            kept = self._source / _STATES / run
            if kept.is_dir() and kept.resolve() != (to / run).resolve():
                to.mkdir(mode=0o700, parents=True, exist_ok=True)  # each is of a single client's data
                parts = shutil.ignore_patterns("*.part")  # of a run that may still go on
                shutil.copytree(kept, to / run, ignore=parts, copy_function=copy_if_there, dirs_exist_ok=True)

    def _named(self, config: ConfigRecord) -> ConfigRecord:
        if isinstance(self.strategy, Guarded):  # it does so itself
            return config
        return messages.named(config, **self._names, checkpoints=self._checkpoints.rounds())

    def _write(self, server_round: int, arrays: ArrayRecord) -> None:
        started = time.monotonic()
        try:
            self._checkpoints.write(
                Checkpoint(
                    server_round=server_round,
                    arrays=arrays,
                    strategy=type(self.strategy).__name__,
                    memory=self._remembered(),
                    exchanges=self._ordered.exchanges if self._ordered is not None else 0,
                    history=self._result,
                    settings=self._settings,
                )
            )
        except (OSError, TypeError) as error:
            facts = event("no-checkpoint", round=server_round, reason=str(error))
            text = "%sround %d: no checkpoint, those before it stand: %s"
            _log.warning(text, PREFIX, server_round, error, extra=facts)
        else:
            seconds = time.monotonic() - started
            facts = event("checkpoint", round=server_round, seconds=round(seconds, 3))
            _log.debug("%sround %d: checkpoint written, %.1f s", PREFIX, server_round, seconds, extra=facts)

    def _remembered(self) -> dict[str, Any]:
        if isinstance(self.strategy, Guarded):
            return self.strategy.remembered()
        kept = {name: getattr(self.strategy, name) for name in _STOCK.get(type(self.strategy), ())}
        return self._names | kept

    def _recall(self, checkpoint: Checkpoint) -> None:
        name = type(self.strategy).__name__
        if checkpoint.strategy != name:
            raise ValueError(f"the checkpoint is of the strategy {checkpoint.strategy}, not {name}")
        memory = forked(checkpoint.memory, checkpoint.server_round)
        if isinstance(self.strategy, Guarded):
            self.strategy.recall(memory)
        else:
            self._names = {name: memory.pop(name) for name in self._names}
            for attribute, value in memory.items():
                setattr(self.strategy, attribute, value)
        self._offset, self._result = checkpoint.server_round, checkpoint.history


def _check_same(kept: ArrayRecord, given: ArrayRecord) -> None:
    """Raises ValueError if the arrays are of different models."""
    for key in sorted({*kept, *given}):
        there, here = (_form(record, key) for record in (kept, given))
        if there != here:
            raise ValueError(f"the checkpoint is of another model: {key!r} is {there} in it, {here} here")


def _form(record: ArrayRecord, key: str) -> str:
    # Not the dtypes: Flower's own strategies change them, as of whole numbers, which they average.
    return str(list(record[key].shape)) if key in record else "missing"
