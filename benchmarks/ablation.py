"""What each choice in FedPM is worth: its settings with one thing changed, on held-out training images.

    python -m benchmarks.ablation --data FOLDER [--datasets cifar10] [--seeds 3]

The settings are those of ``BASE``, or else the tuned ones. Runs are those of a trial of ``benchmarks.tune``: as
many images and rounds, a fifth of the images held out and tested on, the test set not looked at; their seeds are
110, 111, …, which tuning does not use. They are kept in --store, and none that is there is run again.

Columns: the variant, and which setting it changes; accuracy_mean and _std, on held-out images, mean of the last
three rounds, over seeds; minus_base_mean and _std, that minus the unchanged settings' with the same seed, in
points. A run that fails counts as 0.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fedpm_flwr.config import Config, Value
from fedpm_flwr.report import PREFIX
from scripts.processes import exit_on_signals

from .arguments import add_data, check_least, make_parser, split_names
from .experiments import (
    DATASETS,
    NODES,
    RESULTS,
    TRIAL_IMAGES,
    TRIAL_ROUNDS,
    TRIAL_SEED,
    VALIDATION_SHARE,
    Version,
    located,
    tuned,
)
from .runs import Run, Store, data_of, run_missing, settings_of, trial_accuracy
from .table import Row, publish, rounded

SEED = TRIAL_SEED + 10
"""The first: none by which settings were chosen."""
BASE: Mapping[str, Mapping[str, Value]] = {
    "cifar10": {"learning-rate": 0.803, "damping": 0.351, "clip": 1.0, "weighting": "num-examples"},
}
"""In place of what is tuned now, where later searches found hardly other settings: those that had won by then."""
UNCHANGED = "unchanged"
VARIANTS: Mapping[str, Mapping[str, Value]] = {
    UNCHANGED: {},
    "plain averaging": {"algorithm": "localnewton"},
    "clients weigh alike": {"weighting": "uniform"},
    "P of the last measurement": {"ema": 0.0},
    "P of five times as many steps": {"ema": 0.99},
    "P measured in every step": {"refresh-interval": 1},
    "P measured and inverted in every step": {"refresh-interval": 1, "inverse-interval": 1},
    "a third of the damping": {"damping": 1 / 3},
    "three times the damping": {"damping": 3.0},
    "damping by the mean eigenvalue": {"relative-damping": True},
    "a server step of 0.7": {"server-learning-rate": 0.7},
    "a server step of 1.3": {"server-learning-rate": 1.3},
}
"""What is changed: ``damping`` by this factor, all else to this value."""

_SIZE = ("max-train-examples", "num-server-rounds")


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parse(arguments)
    exit_on_signals()
    rows: list[Row] = []
    try:
        for dataset in given.datasets:
            store = Store(given.store or RESULTS / f"ablation-{dataset}.jsonl")
            seeds = [SEED + number for number in range(given.seeds)]
            version = Version(given.images, given.rounds)
            configs = [config_of(dataset, name, version, seed, given.data) for seed in seeds for name in VARIANTS]
            rows += rows_of(run_missing(store, configs, NODES, given.jobs))
    except (RuntimeError, ValueError) as error:  # ConfigError is one
        print(f"{PREFIX}{error}", file=sys.stderr)
        return 2
    publish("ablation", rows, given.output, images=given.images, rounds=given.rounds, first_seed=SEED)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("ablation", __doc__)
    add_data(parser)
    parser.add_argument("--seeds", type=int, default=3, help=f"{SEED}, … (default: %(default)s)")
    parser.add_argument("--images", type=int, default=TRIAL_IMAGES, help="0: all (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=TRIAL_ROUNDS, help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: one a core)")
    parser.add_argument("--store", type=Path, help="default: benchmarks/results/ablation-DATASET.jsonl")
    given = parser.parse_args(arguments)
    split_names(parser, given, datasets=DATASETS)
    check_least(parser, given, seeds=1, images=0, rounds=1, jobs=1)
    return given


def config_of(dataset: str, variant: str, version: Version, seed: int, folder: Path | None = None) -> Config:
    """A run of a variant: FedPM by the settings of ``BASE``, or else as tuned, but for that.

    Raises:
        ConfigError: the tuned settings are missing.
    """
    config = version.of(located(tuned(dataset, "fedpm"), folder))
    config = Config.from_run_config({**config.to_run_config(), **BASE.get(dataset, {})})
    changed = dict(VARIANTS[variant])
    if "damping" in changed:
        changed["damping"] = rounded(config.damping * float(changed["damping"]))
    config = Config.from_run_config(config.to_run_config() | changed)
    return replace(config, validation_share=VALIDATION_SHARE, seed=seed)


def rows_of(runs: Iterable[Run]) -> list[Row]:
    """One row a variant, data set and size: its runs whose seed the unchanged settings were run with too."""
    groups: dict[tuple[Value, ...], dict[str, dict[Value, Run]]] = {}
    for run in runs:
        name = variant_of(run)
        if name is not None:
            size = (data_of(run), *(run.settings[key] for key in _SIZE), run.nodes)
            groups.setdefault(size, {name: {} for name in VARIANTS})[name][run.settings["seed"]] = run
    rows = []
    for variants in groups.values():
        base = variants[UNCHANGED]
        for name, own in variants.items():
            pairs = [(run, base[seed]) for seed, run in own.items() if seed in base]
            rows += [_row(name, pairs)] if pairs else []
    return rows


def variant_of(run: Run) -> str | None:
    """Which of ``VARIANTS`` of today's base a run is of, wherever its data were read."""
    if data_of(run) not in DATASETS:
        return None
    then = {**settings_of(Config()), **run.settings}
    for name in VARIANTS:
        now = settings_of(config_of(data_of(run), name, Version(), SEED))
        if all(then[key] == now[key] for key in now if key not in ("dataset", "seed", *_SIZE)):
            return name
    return None


def _row(variant: str, pairs: Sequence[tuple[Run, Run]]) -> Row:
    own = [trial_accuracy(run) for run, _ in pairs]
    minus = [100 * (trial_accuracy(run) - trial_accuracy(base)) for run, base in pairs]
    several = len(pairs) > 1
    return {
        "dataset": data_of(pairs[0][0]),
        "variant": variant,
        "settings": " ".join(_told(key, value) for key, value in VARIANTS[variant].items()) or None,
        "seeds": len(pairs),
        "failed": sum(bool(run.failure) for run, _ in pairs),
        "accuracy_mean": rounded(statistics.fmean(own)),
        "accuracy_std": rounded(statistics.stdev(own)) if several else None,
        "minus_base_mean": rounded(statistics.fmean(minus)),
        "minus_base_std": rounded(statistics.stdev(minus)) if several else None,
    }


def _told(key: str, value: Value) -> str:
    return f"{key} × {value:.2g}" if key == "damping" else f"{key}={value}"


if __name__ == "__main__":
    sys.exit(main())
