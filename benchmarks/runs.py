"""Runs of the application, each in a process of its own, several at a time; and a file that keeps what they gave.

A run goes through the application's own ServerApp and ClientApp (``fedpm_flwr.inline``); its numbers are those of
the same run under Ray.
"""

import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import count, takewhile
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from fedpm_flwr.config import Config, Value
from fedpm_flwr.report import PREFIX

from .provenance import commit, provenance
from .table import rounded, to_json

Rounds = list[dict[str, float]]
Ended = Callable[[Config, Rounds | str], object]
"""Told of each run as it ends: its rounds, or why it failed."""

_OF_A_PLACE = (
    "output", "resume", "device", "threads", "state-folder", "tensorboard", "checkpoint-every", "checkpoint-keep",
    "round-timeout", "max-payload-mb",
)  # fmt: skip
"""Settings that do not change what a run gives."""
_COLUMNS = (
    "test-accuracy", "test-loss", "train-loss", "clients", "local-steps", "uplink-bytes", "seconds", "cpu-seconds",
)  # fmt: skip
_IMPORTED = [
    "client_app", "server_app", "fedpm_flwr.inline", "flwr_datasets.partitioner", "sklearn.datasets",
    "torch._dynamo",
]  # fmt: skip
"""What takes long to import in a run: its own modules, and what they import when it is used."""
_DIGITS = 6
_PART_BYTES = 1_000_000
"""Flower Hub takes no file above 1 MiB."""
_LAST = 3
"""Rounds whose accuracies a trial is judged by."""


def run_all(configs: Sequence[Config], nodes: int, jobs: int, ended: Ended | None = None) -> dict[str, Rounds]:
    """The rounds of each run that succeeded, by its output folder; says why the others did not.

    To what the report tells of a round, ``cpu-seconds`` is added: the time that the process has computed in all,
    imports apart, which other runs beside it change little, in equal parts to the rounds. ``ended`` is not told of
    a run that was killed, or broke off for another reason than that its rounds failed.
    """
    done: dict[str, Rounds] = {}
    started = time.monotonic()
    with in_threads(min(jobs, len(configs))) as threads:
        futures = {threads.submit(_in_a_process, config, nodes): config for config in configs}
        for number, future in enumerate(as_completed(futures), start=1):
            config = futures[future]
            output = Path(config.output)
            try:
                gave = future.result()
            except BrokenProcessPool:
                said = "its process was killed"
            except Exception as error:  # one run's failure, whatever it is, is not the others'
                said = f"failed: {type(error).__name__}: {error}; its log: {output / 'flower.log'}"
            else:
                if isinstance(gave, str):
                    said = f"failed: {gave}; its log: {output / 'flower.log'}"
                else:
                    done[config.output] = gave
                    goal = "distance" if "distance" in gave[-1] else "test-accuracy"
                    said = f"{goal.removeprefix('test-')} {gave[-1][goal]:.4g}"
                if ended is not None:
                    ended(config, gave)
            left = (time.monotonic() - started) / number * (len(configs) - number)
            print(f"{PREFIX}{number}/{len(configs)}  {output.name}  {said}  {left:.0f} s left", flush=True)
    return done


@contextmanager
def in_threads(jobs: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads that each wait for runs; whatever ends this one ends their runs too."""
    _warm_up()
    with ThreadPoolExecutor(jobs) as threads:
        try:
            yield threads
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.kill()
            raise


@cache
def _warm_up() -> None:
    """Have a process of which runs are forked, with all imports done: until then no run could be ended."""
    process = _context().Process(target=_nothing)
    process.start()
    process.join()


def _nothing() -> None:
    pass


def _context() -> ForkServerContext:
    # Forked from a server that has imported everything and computed nothing: imports are most of a short run, and
    # a fork of this process, with its threads, could hang. There is one server; variables that are set once it has
    # started do not reach it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    return context


def _in_a_process(config: Config, nodes: int) -> Rounds | str:
    """A process for each run: each starts as cold as the others, and one that is killed takes no other along."""
    with ProcessPoolExecutor(1, _context()) as pool:
        return pool.submit(_run, config, nodes).result()


def _run(config: Config, nodes: int) -> Rounds | str:
    """One run, or why its rounds failed; what Flower and the application say goes to flower.log.

    In a process of its own: the log stays its output, and it ends with the one that has started it.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "flower.log").open("w") as log:
        # Beneath Python, whose stderr Flower's logger has kept since it was imported.
        for output in (1, 2):
            os.dup2(log.fileno(), output)
    import client_app
    import server_app
    from fedpm_flwr.guarded import FailedRoundsError
    from fedpm_flwr.inline import run_inline

    before = time.process_time()
    try:
        run_inline(server_app.app, client_app.app, nodes, config.to_run_config())
    except FailedRoundsError as error:
        return f"{type(error).__name__}: {error}"
    rounds = read_rounds(folder)
    share = (time.process_time() - before) / max(len(rounds) - 1, 1)
    return [{**row, "cpu-seconds": share if row["round"] else 0.0} for row in rounds]


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def read_rounds(folder: Path) -> Rounds:
    """The metrics that a run has left."""
    rounds: Rounds = json.loads((folder / "metrics.json").read_text(), object_hook=_with_nan)
    return rounds


def rounds_to(rounds: Rounds, accuracy: float) -> int | None:
    """The first round after which a run has this test accuracy; None: there is none."""
    return next((int(row["round"]) for row in rounds[1:] if row["test-accuracy"] >= accuracy), None)


@dataclass(frozen=True)
class Run:
    """What a run was, what it gave, and where.

    ``settings``: all but those of a place; of files the name alone. ``failure``: why it has no rounds, or "".
    """

    settings: Mapping[str, Value]
    nodes: int
    rounds: Rounds
    failure: str
    provenance: Mapping[str, Any]


class Store:
    """A file of JSON lines, one a run, which grows over time and machines; no run in it is run again.

    Of the file NAME.jsonl, NAME.2.jsonl and so on are further parts, begun when one is full.

    Raises:
        ValueError: naming the file, the line and what is wrong with it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writing = threading.Lock()
        self.runs = [run for part in self._parts() for run in _read(part)]

    def _parts(self) -> list[Path]:
        return [self.path, *takewhile(Path.is_file, map(self._part, count(2)))]

    def _part(self, number: int) -> Path:
        return self.path.with_suffix(f".{number}{self.path.suffix}")

    def find(self, config: Config, nodes: int) -> Run | None:
        """The newest run of this configuration."""
        wanted, defaults = settings_of(config), settings_of(Config())
        for run in reversed(self.runs):
            if run.nodes == nodes and {**defaults, **run.settings} == wanted:
                return run
        return None

    def add(self, config: Config, nodes: int, gave: Rounds | str) -> Run:
        """Keep the rounds of a run, or why it failed."""
        rounds, failure = ([], gave) if isinstance(gave, str) else (gave, "")
        run = Run(settings_of(config), nodes, [_kept(row) for row in rounds], failure, provenance())
        columns = {key: [row.get(key) for row in run.rounds] for key in _COLUMNS}
        document = {"settings": run.settings, "nodes": nodes, "failure": failure, "provenance": run.provenance}
        line = to_json({**document, "rounds": columns})
        with self._writing:
            self._append(f"{line}\n".encode())
            self.runs.append(run)
        return run

    def _append(self, line: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        parts = self._parts()
        with parts[-1].open("a+b") as file:
            file.seek(0)
            size = file.truncate(file.read().rfind(b"\n") + 1)  # a last line that was cut short
            if not size or size + len(line) <= _PART_BYTES:
                file.write(line)
                return
        with self._part(len(parts) + 1).open("ab") as file:
            file.write(line)


def run_missing(store: Store, configs: Sequence[Config], nodes: int, jobs: int) -> list[Run]:
    """The run of each configuration: from the store, or run now and kept there as soon as it ends.

    Raises:
        RuntimeError: a run was killed, or broke off; the others are in the store.
    """
    commit()  # asked for now, and not when the first run is there
    missing = [config for config in configs if store.find(config, nodes) is None]
    if len(missing) < len(configs):
        print(f"{PREFIX}{len(configs) - len(missing)} of {len(configs)} runs are in {store.path}", flush=True)
    if missing:
        with tempfile.TemporaryDirectory(prefix="fedpm-flwr-") as folder:
            placed = [replace(one, output=f"{folder}/{i}-{one.algorithm}") for i, one in enumerate(missing)]
            run_all(placed, nodes, jobs, lambda config, gave: store.add(config, nodes, gave))
    found = [run for config in configs if (run := store.find(config, nodes)) is not None]
    if len(found) < len(configs):
        raise RuntimeError(f"{len(configs) - len(found)} runs broke off; the same command runs them again")
    return found


def settings_of(config: Config) -> dict[str, Value]:
    """What decides what a run gives."""
    settings = {key: value for key, value in config.to_run_config().items() if key not in _OF_A_PLACE}
    for key in ("dataset", "initial-model", "reference-model"):
        kind, colon, path = str(settings[key]).rpartition(":")
        settings[key] = f"{kind}{colon}{Path(path).name}"
    return settings


def data_of(run: Run) -> str:
    """The name of its data set, from wherever it was read."""
    return Path(str(run.settings["dataset"]).rpartition(":")[2]).stem


def trial_accuracy(run: Run) -> float:
    """What a trial of ``benchmarks.tune`` is judged by: the mean over the last rounds; 0 if it failed."""
    if run.failure:
        return 0.0
    return rounded(statistics.fmean(row["test-accuracy"] for row in run.rounds[1:][-_LAST:]))


def _read(path: Path) -> list[Run]:
    if not path.exists():
        return []
    *lines, rest = path.read_text(encoding="utf-8").split("\n")
    if rest:  # whoever wrote it was stopped
        print(f"{PREFIX}{path}: the last line is cut short, its run does not count", file=sys.stderr)
    return [_parsed(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def _parsed(line: str, place: str) -> Run:
    try:
        document = json.loads(line)
        columns: dict[str, list[float | None]] = document["rounds"]
        count = len(columns[_COLUMNS[0]])
        rounds = [
            {"round": float(i), **_with_nan({key: column[i] for key, column in columns.items()})}
            for i in range(count)
        ]
        return Run(document["settings"], document["nodes"], rounds, document["failure"], document["provenance"])
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{place}: not a run: {type(error).__name__}: {error}") from error


def _kept(row: Mapping[str, float]) -> dict[str, float]:
    return {"round": row["round"]} | {key: float(f"{row.get(key, math.nan):.{_DIGITS}g}") for key in _COLUMNS}


def _with_nan(row: dict[str, float | None]) -> dict[str, float]:
    """JSON's null is a number that was not finite."""
    return {key: math.nan if value is None else value for key, value in row.items()}
