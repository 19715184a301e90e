"""Search each method's settings, as many trials for each in a call, on training images that no client trains on.

    python -m benchmarks.tune --data FOLDER [--datasets cifar10] [--methods fedavg,fedpm,…] [--trials 10]

A trial is a run of the experiment (benchmarks/experiments.py) with the first --images training images, of which a
fifth is held out (``validation-share``; the same for all trials and methods), for --rounds rounds at α = 0.1 with
the seed --seed, which the tables do not use. The test set is not looked at. What counts is the mean accuracy on
the held-out images after the last three rounds; a run that fails counts as 0. The first trial of a method is where
the literature or earlier runs would begin (``SPACES``), the others are optuna's TPE's, seeded. The best
--finalists of all trials are run again with the next --more-seeds seeds, and so other partitions and initial
models, and the best mean over all these seeds wins: a search by one seed finds settings that suit that seed.
At last the winner's clients weigh alike (``weighting=uniform``), with all these seeds: that stays if it is better.

All trials are kept in --store, and none that is there is run again: a search that was broken off goes on.
Finalists are the best of all that are kept, of earlier searches in other spaces too. The settings that win go to
benchmarks/configs/DATASET-METHOD.toml, which ``flwr run . --run-config`` takes as well. With --trials 0 the files
are where searches would begin, and say so.

Columns: the method, its kept trials and how many of them failed; accuracy, of the winner, mean over seeds; best,
of a trial; first, of the first trial of this search; the settings that were found.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from fedpm_flwr.config import Config, ConfigError, Value
from scripts.processes import exit_on_signals

from .arguments import add_data, check_least, make_parser, split_names
from .experiments import (
    ALGORITHMS,
    CONFIGS,
    DATASETS,
    NODES,
    RESULTS,
    TRIAL_IMAGES,
    TRIAL_ROUNDS,
    TRIAL_SEED,
    VALIDATION_SHARE,
    Version,
    base,
    configs_file,
    located,
)
from .runs import Run, Store, in_threads, run_missing, settings_of, trial_accuracy
from .table import Row, publish, rounded

_DIGITS = 3


@dataclass(frozen=True)
class Space:
    """What is searched, and where a search begins."""

    of: Mapping[str, BaseDistribution]
    first: Mapping[str, Value]


def _log(low: float, high: float) -> FloatDistribution:
    return FloatDistribution(low, high, log=True)


_CLIP = CategoricalDistribution((0.0, 1.0))
_FIRST_ORDER = {
    "learning-rate": _log(0.003, 1.0),
    "momentum": CategoricalDistribution((0.0, 0.9)),
    "clip": _CLIP,
}
_FIRST: Mapping[str, Value] = {"learning-rate": 0.1, "momentum": 0.0, "clip": 1.0}
_SECOND_ORDER = Space(
    {"learning-rate": _log(0.03, 1.0), "damping": _log(0.03, 10.0), "clip": _CLIP},
    {"learning-rate": 0.3, "damping": 1.0, "clip": 1.0},
)
_CLIPPED = {**_SECOND_ORDER.of, "clip": CategoricalDistribution((1.0,))}
SPACES: Mapping[str, Space] = {
    "fedavg": Space(_FIRST_ORDER, _FIRST),
    "fedavgm": Space(
        {**_FIRST_ORDER, "server-momentum": FloatDistribution(0.0, 0.95)}, {**_FIRST, "server-momentum": 0.5}
    ),
    "fedprox": Space({**_FIRST_ORDER, "proximal-mu": _log(1e-3, 1.0)}, {**_FIRST, "proximal-mu": 0.01}),
    "scaffold": Space(
        {"learning-rate": _log(0.003, 1.0), "clip": _CLIP, "server-learning-rate": FloatDistribution(0.3, 1.0)},
        {"learning-rate": 0.1, "clip": 1.0, "server-learning-rate": 1.0},
    ),
    "fedadam": Space({**_FIRST_ORDER, "adam-eta": _log(3e-3, 0.3)}, {**_FIRST, "adam-eta": 0.03}),
    "ltda": Space(
        {"learning-rate": _log(0.01, 10.0), "damping": _log(1e-3, 10.0), "clip": _CLIP},
        {"learning-rate": 0.3, "damping": 1.0, "clip": 1.0},
    ),
    "fedsophia": Space(
        {"learning-rate": _log(1e-4, 0.1), "sophia-gamma": _log(1e-3, 1.0)},
        {"learning-rate": 0.003, "sophia-gamma": 0.01},
    ),
    # Without a clip both diverge now and then, which a search by one seed may not see. Each begins at the other's
    # winner, so that averaging FedPM's own steps is among what is chosen from, and mixing LocalNewton's.
    "localnewton": Space(_CLIPPED, {"learning-rate": 0.803, "damping": 0.351, "clip": 1.0}),
    "fedpm": Space(_CLIPPED, {"learning-rate": 0.817, "damping": 0.735, "clip": 1.0}),
    "fedpm-corrected": _SECOND_ORDER,
}


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parse(arguments)
    exit_on_signals()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rows: list[Row] = []
    for dataset in given.datasets:
        own = [RESULTS / f"tune-{dataset}-{method}.jsonl" for method in given.methods]
        stores = [Store(given.store)] * len(own) if given.store else [Store(path) for path in own]
        # A search after the other for each method, so that its course does not depend on the number of cores.
        with in_threads(given.jobs) as pool:
            rows += pool.map(partial(search, given, dataset), given.methods, stores)
    publish("tune", rows, given.output, trials=given.trials, images=given.images, rounds=given.rounds)
    return 0 if not given.trials or all(row["accuracy"] is not None for row in rows) else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("tune", __doc__)
    add_data(parser)
    parser.add_argument("--methods", default=",".join(ALGORITHMS), help="default: %(default)s")
    parser.add_argument(
        "--trials", type=int, default=10, help="of each method; 0: begin only (default: %(default)s)"
    )
    parser.add_argument("--images", type=int, default=TRIAL_IMAGES, help="0: all (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=TRIAL_ROUNDS, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=TRIAL_SEED, help="of runs and search (default: %(default)s)")
    parser.add_argument("--finalists", type=int, default=3, help="that are run again (default: %(default)s)")
    parser.add_argument("--more-seeds", type=int, default=2, help="that they are run with (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: one a core)")
    parser.add_argument("--store", type=Path, help="default: benchmarks/results/tune-DATASET-METHOD.jsonl")
    parser.add_argument("--configs", type=Path, help="folder for the .toml files (default: benchmarks/configs)")
    given = parser.parse_args(arguments)
    split_names(parser, given, datasets=DATASETS, methods=ALGORITHMS)
    check_least(parser, given, trials=0, images=0, rounds=1, seed=0, finalists=1, more_seeds=0, jobs=1)
    return given


def search(given: argparse.Namespace, dataset: str, algorithm: str, store: Store) -> Row:
    """All trials of one method; writes the best settings, and tells them as a row."""
    space = SPACES[algorithm]
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.TPESampler(seed=given.seed, n_startup_trials=5)
    )
    study.enqueue_trial(dict(space.first))
    path = (given.configs or CONFIGS) / configs_file(dataset, algorithm).name
    if not given.trials:
        write(
            path,
            "# Not tuned: where a search would begin (python -m benchmarks.tune).",
            dataset,
            algorithm,
            space.first,
        )
        return {"dataset": dataset, "method": algorithm, "trials": 0, "accuracy": None, **space.first}
    for _ in range(given.trials):
        trial = study.ask(dict(space.of))
        (run,) = run_missing(store, [config_of(given, dataset, algorithm, _rounded(trial.params))], NODES, 1)
        study.tell(trial, trial_accuracy(run))
    trials = trials_of(store, config_of(given, dataset, algorithm, {}))
    winner, accuracy = final(given, store, dataset, algorithm, trials)
    found = {key: winner.settings[key] for key in (*space.of, "weighting")}
    if accuracy:
        size = f"{given.images or 'all'} images, {given.rounds} rounds, seeds {given.seed}"
        more = f" to {given.seed + given.more_seeds}" if given.more_seeds else ""
        comment = (
            f"# Expected: accuracy {accuracy:.3f} on held-out training images: the best of {len(trials)} trials\n"
            f"# ({size}{more}; python -m benchmarks.tune). On the test set: docs/results.md."
        )
        write(path, comment, dataset, algorithm, found)
    return {
        "dataset": dataset,
        "method": algorithm,
        "trials": len(trials),
        "failed": sum(bool(run.failure) for run in trials),
        "accuracy": rounded(accuracy) if accuracy else None,
        "best": max(map(trial_accuracy, trials)),
        "first": study.trials[0].value,
        **found,
    }


def final(
    given: argparse.Namespace, store: Store, dataset: str, algorithm: str, trials: Sequence[Run]
) -> tuple[Run, float]:
    """A run of the settings that win, and their mean accuracy over seeds."""
    finalists = sorted(trials, key=trial_accuracy, reverse=True)[: given.finalists]
    seeds = range(given.seed, given.seed + given.more_seeds + 1)

    def over_seeds(settings: Mapping[str, Value]) -> tuple[Run, float]:
        config = config_of(given, dataset, algorithm, settings)
        runs = run_missing(store, [replace(config, seed=seed) for seed in seeds], NODES, 1)
        return runs[0], statistics.fmean(map(trial_accuracy, runs))

    def by_mean(candidate: tuple[Run, float]) -> float:
        return candidate[1]

    def found(run: Run) -> dict[str, Value]:
        return {key: value for key, value in run.settings.items() if key in searched()}

    best = max((over_seeds(found(trial)) for trial in finalists), key=by_mean)
    return max(best, over_seeds({**found(best[0]), "weighting": "uniform"}), key=by_mean)


def searched() -> set[str]:
    """All settings that are searched for some method."""
    return {key for space in SPACES.values() for key in space.of}


def trials_of(store: Store, like: Config) -> list[Run]:
    """All that are kept of this method and size, in whatever spaces they were searched."""
    free = searched()
    same = {key: value for key, value in settings_of(like).items() if key not in free}
    return [run for run in store.runs if same.items() <= {**settings_of(Config()), **run.settings}.items()]


def config_of(given: argparse.Namespace, dataset: str, algorithm: str, settings: Mapping[str, Value]) -> Config:
    """One trial's run."""
    experiment = Config.from_run_config({**base(dataset, algorithm), **settings})
    version = Version(given.images, given.rounds)
    try:
        return replace(
            version.of(located(experiment, given.data)), validation_share=VALIDATION_SHARE, seed=given.seed
        )
    except ConfigError as error:
        raise SystemExit(f"{algorithm}: {error}") from error


def write(path: Path, comment: str, dataset: str, algorithm: str, found: Mapping[str, Value]) -> None:
    """The file that ``experiments.tuned`` and ``flwr run`` read."""
    settings = {**base(dataset, algorithm), **found}
    lines = Config.from_run_config(settings).to_toml().splitlines()
    path.parent.mkdir(parents=True, exist_ok=True)
    chosen = [line for line in lines if line.partition(" = ")[0] in settings]
    path.write_text("\n".join([comment, *chosen]) + "\n", encoding="utf-8")


def _rounded(settings: Mapping[str, Value]) -> dict[str, Value]:
    """What nobody would write with more digits is run with no more."""
    return {k: float(f"{v:.{_DIGITS}g}") if isinstance(v, float) else v for k, v in settings.items()}


if __name__ == "__main__":
    sys.exit(main())
