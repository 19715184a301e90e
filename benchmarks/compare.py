"""Several algorithms on the same partitions, initial models and seeds: one table, one plot.

    python -m benchmarks.compare [--nodes 10] [algorithms=A,B,…] [seeds=3] [KEY=VALUE …]

An algorithm may bring settings of its own, as in algorithms=fedavg:learning-rate=0.3,fedpm. The seeds
are seed, seed + 1, …. Every run goes through the application's own ServerApp and ClientApp in a
process of its own, several at a time; the numbers are those of the same run under Ray. All of it is
left in the folder that output=FOLDER names, else under runs/.

Columns: accuracy and loss of the global model on the test set after the last round, mean and standard
deviation over seeds; accuracy after a quarter and a half of the rounds; the rounds until a run first
has the accuracy with which the best of the other rows ends, mean over the seeds that get there, and
how many do; MB from clients to server in all, and seconds, a run.
"""

import argparse
import math
import os
import signal
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from fedpm_flwr.config import Config, ConfigError, describe, parse_settings
from fedpm_flwr.report import PREFIX, plot_curves
from fedpm_flwr.tasks import build_model, load_dataset, load_weights
from scripts.processes import exit_on_signals

from .provenance import commit
from .runs import Rounds, rounds_to, run_all
from .table import Row, publish

_DEFAULT_ALGORITHMS = "fedavg:learning-rate=0.3,localnewton,fedpm"
_DEFAULT_SEEDS = 3
_OWN = "algorithms: names joined by commas, each with :KEY=VALUE for settings of its own\nseeds: how many\n"
_PROBLEM = ("dataset", "max-train-examples", "validation-share", "partition", "alpha", "model", "initial-model")
_FOOT = (
    "accuracy and loss are the global model's on the test set, after a quarter, a half and all of the rounds, "
    "means over seeds;\nrounds_to_best_rival: until it has what the best of the others ends with, if it gets there"
)
_SAME_FOR_ALL = ("algorithm", "output", "seed", *_PROBLEM)
"""Settings that an algorithm cannot bring of its own: the comparison would not be one."""


@dataclass(frozen=True)
class Method:
    """One row: an algorithm, the settings it brings, and one configuration per seed."""

    algorithm: str
    settings: str
    configs: tuple[Config, ...]

    @property
    def label(self) -> str:
        return f"{self.algorithm} {self.settings}".strip()


def main(arguments: Sequence[str] | None = None) -> int:
    exit_on_signals()
    commit()  # asked for now, and not when the figures are there
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__.split("\n")[0],
        epilog=f"settings:\n{_OWN}{describe()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--nodes", type=int, default=10, help="virtual clients (default: 10)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: one a core)")
    parser.add_argument("--output", type=Path, help="write the table as JSON to this file too")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_args(arguments)
    try:
        for name in ("nodes", "jobs"):
            if getattr(given, name) < 1:
                raise ConfigError(f"--{name}={getattr(given, name)} is not allowed; allowed: >= 1")
        folder, methods = plan(parse_settings(given.settings), given.nodes)
    except ConfigError as error:
        print(f"{PREFIX}{error}", file=sys.stderr)
        return 2
    problem = find_problem(methods, given.output)
    if problem:
        print(f"{PREFIX}{problem}", file=sys.stderr)
        return 2
    try:
        runs = run_all([config for method in methods for config in method.configs], given.nodes, given.jobs)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    done = {m: [runs[c.output] for c in m.configs] for m in methods if all(c.output in runs for c in m.configs)}
    for method in methods:
        if method not in done:
            print(f"{PREFIX}left out of the table, since a run failed: {method.label}", file=sys.stderr)
    if done:
        plot_curves({method.label: rounds for method, rounds in done.items()}, folder / "curves.png")
        print(f"{PREFIX}curves in {folder / 'curves.png'}")
        rows = table(done)
        publish("compare", rows, folder / "compare.json", _FOOT, nodes=given.nodes, runs_at_a_time=given.jobs)
        if given.output:
            given.output.parent.mkdir(parents=True, exist_ok=True)
            given.output.write_text((folder / "compare.json").read_text(encoding="utf-8"), encoding="utf-8")
    return 0 if len(done) == len(methods) else 1


def plan(settings: dict[str, Any], nodes: int) -> tuple[Path, list[Method]]:
    """The folder of the comparison, and what to run.

    Raises:
        ConfigError: a setting is not allowed.
    """
    settings = {"min-available-nodes": nodes, **settings}
    algorithms, seeds = settings.pop("algorithms", _DEFAULT_ALGORITHMS), settings.pop("seeds", _DEFAULT_SEEDS)
    if type(seeds) is not int or seeds < 1:
        raise ConfigError(f"seeds={seeds!r} is not allowed; allowed: whole number >= 1")
    if "algorithm" in settings:
        raise ConfigError(f"algorithm={settings['algorithm']!r}: say algorithms=… here")
    name = f"{datetime.now():%Y%m%d-%H%M%S}-compare"
    folder = Path(str(settings.pop("output", "")) or Path.cwd() / "runs" / name)
    methods: list[Method] = []
    for entry in str(algorithms).split(","):
        algorithm, *own = entry.strip().split(":")
        for key in parse_settings(own):
            if key in _SAME_FOR_ALL:
                raise ConfigError(f"algorithms={algorithms!r}: {key} must be the same for all: say it once, apart")
        base = Config.from_run_config({**settings, **parse_settings(own), "algorithm": algorithm})
        base.check_nodes(nodes)
        numbers = range(base.seed, base.seed + seeds)
        places = {seed: "-".join([algorithm, *own, f"seed={seed}"]) for seed in numbers}
        configs = tuple(replace(base, seed=seed, output=str(folder / name)) for seed, name in places.items())
        methods.append(Method(algorithm, " ".join(own), configs))
    if len({method.label for method in methods}) < len(methods):
        raise ConfigError(f"algorithms={algorithms!r} names one twice")
    return folder, methods


def find_problem(methods: Sequence[Method], output: Path | None) -> str:
    """Why no run could succeed, found before the first of them starts; empty: nothing was found."""
    config = methods[0].configs[0]
    try:
        split = load_dataset(config.dataset, config.max_train_examples, config.validation_share)
        model = build_model(config.model, split.input_shape, split.classes, config.seed, split.input_dtype)
        if config.initial_model:
            load_weights(model, config.initial_model)
        Path(config.output).mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        return str(error)
    return f"--output={output}: a folder, not a file" if output is not None and output.is_dir() else ""


def table(done: dict[Method, list[Rounds]]) -> list[Row]:
    """One row a method, from the rounds of its runs, seed by seed."""
    return [
        _row(method, runs, [other for rival, other in done.items() if rival is not method])
        for method, runs in done.items()
    ]


def _row(method: Method, runs: list[Rounds], rivals: list[list[Rounds]]) -> Row:
    accuracies = [rounds[-1]["test-accuracy"] for rounds in runs]
    best = [max(rounds[-1]["test-accuracy"] for rounds in same_seed) for same_seed in zip(*rivals, strict=True)]
    goals = best or [math.inf] * len(runs)  # nobody else is there
    reached = [number for run, goal in zip(runs, goals, strict=True) if (number := rounds_to(run, goal))]
    return {
        "method": method.algorithm,
        "settings": method.settings,
        "seeds": len(runs),
        "accuracy_at_quarter": _mean(rounds[math.ceil(len(rounds[1:]) / 4)]["test-accuracy"] for rounds in runs),
        "accuracy_at_half": _mean(rounds[math.ceil(len(rounds[1:]) / 2)]["test-accuracy"] for rounds in runs),
        "accuracy_mean": _mean(accuracies),
        "accuracy_std": _rounded(statistics.stdev(accuracies)) if len(runs) > 1 else None,
        "loss_mean": _mean(rounds[-1]["test-loss"] for rounds in runs),
        "rounds_to_best_rival": _mean(reached) if reached else None,
        "seeds_reaching_it": len(reached),
        "uplink_mb": _mean(sum(row["uplink-bytes"] for row in rounds) / 1e6 for rounds in runs),
        "seconds": _mean(sum(row["seconds"] for row in rounds) for rounds in runs),
    }


def _mean(values: Iterable[float]) -> float | None:
    return _rounded(statistics.fmean(values))


def _rounded(value: float) -> float | None:
    """Five digits: more would not be read, nor be true. None: not finite."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


if __name__ == "__main__":
    sys.exit(main())
