"""The paper's Test 2 on heterogeneous images: FedPM beside its rivals, each with its own tuned settings.

    python -m benchmarks.vision --data FOLDER [--datasets cifar10] [--alphas 1.0,0.1] [--methods …] [--seeds 3]
    python -m benchmarks.vision --data FOLDER --budget-minutes 60
    python -m benchmarks.vision --data FOLDER --sweep epochs|alpha|clients|participation

CIFAR-10 with LeNet, CIFAR-100 with ResNet18-GN; 10 clients, all of them in each round, 5 local epochs, 100 rounds,
Dirichlet 1.0 and 0.1 (benchmarks/experiments.py), with the settings of benchmarks/configs, which
``benchmarks.tune`` has found. FOLDER has cifar10.npz; what it has not comes from torchvision. Runs go through the
application's own ServerApp and ClientApp, several at a time, are kept in --store as they end, and are not run
again: a command that was broken off goes on where it was.

--images, --rounds and --epochs run less of all methods alike; --budget-minutes picks the largest of a few such
versions that this machine is likely to finish in this time. --sweep varies one thing: ``epochs``, the local ones,
at as many in all; ``alpha``; ``clients``; ``participation``, of 100 clients.

Columns: accuracy_mean and _std, test accuracy after the last round, over seeds; paper, what the paper has for the
whole experiment with its own CNN; rounds_to_fedavg, the first round with the accuracy that FedAvg ends with, mean
over seeds, if all get there; at_fedavgs_mb, at_fedavgs_seconds, the accuracy when as many bytes (to the server) or
seconds are spent as FedAvg spends in all, on the line between two rounds; uplink_mb from all clients in all
rounds; local_steps a client, weighed by examples; seconds of one core (on a GPU: of the clock) that all clients
and the server take, tests of the model included.
"""

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from fedpm_flwr.config import Config, ConfigError, Value
from fedpm_flwr.optim import FOOF
from fedpm_flwr.report import PREFIX
from fedpm_flwr.tasks import build_model
from fedpm_flwr.training import pick_device
from scripts.processes import exit_on_signals

from .arguments import add_data, check_least, make_parser, split_names
from .experiments import ALPHAS, DATASETS, METHODS, NODES, PAPER, RESULTS, Version, located, tuned
from .runs import Rounds, Run, Store, data_of, rounds_to, run_missing
from .table import Row, publish, rounded

VERSIONS = (
    Version(0, 100), Version(0, 20), Version(20_000, 20), Version(10_000, 12), Version(5_000, 10),
    Version(1_000, 5), Version(200, 2),
)  # fmt: skip
"""Of --budget-minutes, the largest first; few, so that runs of several machines meet."""
_TEST_IMAGES, _TRAIN_IMAGES = 10_000, 50_000
_START_S = 10.0
_FORWARD = 1 / 3
"""What testing an image costs, training it being 1."""
_BASELINE = "fedavg"
_SWEPT_EPOCHS = (10, 5, 1)
_SWEPT_METHODS = "fedavg,scaffold,localnewton,fedpm"


@dataclass(frozen=True)
class Case:
    """An experiment but for its method and its seed."""

    dataset: str
    alpha: float
    version: Version
    nodes: int = NODES
    participation: float = 1.0

    def config(self, method: str, seed: int, folder: Path | None) -> Config:
        config = self.version.of(located(tuned(self.dataset, method), folder))
        return replace(
            config, alpha=self.alpha, seed=seed, min_available_nodes=self.nodes, fraction_train=self.participation
        )


def _same_epochs(case: Case) -> list[Case]:
    """As many local epochs in all, in more rounds or fewer."""
    rounds = case.version.rounds or 100
    total = rounds * (case.version.epochs or 5)
    return [
        replace(case, version=replace(case.version, rounds=total // epochs, epochs=epochs))
        for epochs in _SWEPT_EPOCHS
    ]


SWEEPS: Mapping[str, Callable[[Case], list[Case]]] = {
    "epochs": _same_epochs,
    "alpha": lambda case: [replace(case, alpha=alpha) for alpha in (0.03, 0.1, 0.3, 1.0, 10.0)],
    "clients": lambda case: [replace(case, nodes=nodes) for nodes in (10, 50, 100)],
    "participation": lambda case: [replace(case, nodes=100, participation=share) for share in (1.0, 0.5, 0.1)],
}


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parse(arguments)
    exit_on_signals()
    rows: list[Row] = []
    try:
        cases = [case for dataset in given.datasets for case in cases_of(given, dataset)]
        store = Store(given.store)
        for nodes in dict.fromkeys(case.nodes for case in cases):
            of_these = [case for case in cases if case.nodes == nodes]
            # Seed by seed: a command that is broken off leaves whole comparisons.
            configs = [
                case.config(method, seed, given.data)
                for seed in range(given.seeds)
                for case in of_these
                for method in given.methods
            ]
            rows += rows_of(run_missing(store, configs, nodes, given.jobs))
    except (RuntimeError, ValueError) as error:  # ConfigError is one
        print(f"{PREFIX}{error}", file=sys.stderr)
        return 2
    publish("vision", rows, given.output, store=given.store.name)
    return 0 if all(not row["failed"] for row in rows) else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("vision", __doc__)
    add_data(parser)
    parser.add_argument("--alphas", default=",".join(map(str, ALPHAS)), help="default: %(default)s")
    parser.add_argument("--methods", help=f"default: {','.join(METHODS)}; with --sweep: {_SWEPT_METHODS}")
    parser.add_argument("--seeds", type=int, default=3, help="0, 1, … (default: %(default)s)")
    parser.add_argument("--images", type=int, default=0, help="only the first training images; 0: all (default)")
    parser.add_argument("--rounds", type=int, default=0, help="0: as the experiment has them (default)")
    parser.add_argument(
        "--epochs", type=int, default=0, help="local ones; 0: as the experiment has them (default)"
    )
    parser.add_argument("--budget-minutes", type=float, help="pick --images and --rounds for so many minutes")
    parser.add_argument("--sweep", choices=tuple(SWEEPS), help="vary this, at the least of --alphas")
    jobs = 1 if torch.cuda.is_available() else os.cpu_count()
    parser.add_argument(
        "--jobs", type=int, default=jobs, help="runs at a time (default: one a core; on a GPU one)"
    )
    parser.add_argument("--store", type=Path, default=RESULTS / "vision.jsonl", help="keep the runs in this file")
    given = parser.parse_args(arguments)
    given.methods = given.methods or (_SWEPT_METHODS if given.sweep else ",".join(METHODS))
    split_names(parser, given, datasets=DATASETS, methods=METHODS)
    try:
        given.alphas = [float(alpha) for alpha in given.alphas.split(",")]
        for alpha in given.alphas:
            Config(alpha=alpha)
    except (ValueError, ConfigError) as error:
        parser.error(f"--alphas={given.alphas}: {error}")
    check_least(parser, given, seeds=1, images=0, rounds=0, epochs=0, jobs=1)
    if given.budget_minutes is not None and (given.images or given.rounds or given.epochs or given.sweep):
        parser.error("--budget-minutes picks a version itself: leave --images, --rounds, --epochs and --sweep out")
    total = (given.rounds or 100) * (given.epochs or 5)
    if given.sweep == "epochs" and total % max(_SWEPT_EPOCHS):
        parser.error(f"--sweep epochs: {total} local epochs in all are not a multiple of {max(_SWEPT_EPOCHS)}")
    return given


def cases_of(given: argparse.Namespace, dataset: str) -> list[Case]:
    """What is asked for of one data set."""
    version = Version(given.images, given.rounds, given.epochs)
    if given.sweep:
        return SWEEPS[given.sweep](Case(dataset, min(given.alphas), version))
    if given.budget_minutes is not None:
        runs = len(given.alphas) * len(given.methods) * given.seeds
        share = given.budget_minutes * 60 * given.jobs / len(given.datasets) / runs
        experiment = tuned(dataset, given.methods[0])
        version = pick_version(share, experiment.local_epochs, images_per_second(experiment.model, dataset))
        images = version.images or _TRAIN_IMAGES
        print(
            f"{PREFIX}{dataset}: {images:,} training images and {version.rounds} rounds for all methods alike, so "
            f"that {runs} runs fit into {given.budget_minutes:g} minutes (the whole experiment: "
            f"{_TRAIN_IMAGES:,} images, {experiment.num_server_rounds} rounds); to go on with these later: "
            f"--images {version.images} --rounds {version.rounds}",
            flush=True,
        )
    return [Case(dataset, alpha, version) for alpha in given.alphas]


def pick_version(seconds: float, epochs: int, rate: float) -> Version:
    """The largest version that one run of so many seconds of a core can be; the smallest, if none."""
    for version in VERSIONS:
        trained = (version.images or _TRAIN_IMAGES) * epochs * version.rounds
        if _START_S + (trained + _FORWARD * _TEST_IMAGES * version.rounds) / rate <= seconds:
            return version
    return VERSIONS[-1]


def images_per_second(model_name: str, dataset: str, seconds: float = 2.0) -> float:
    """How many images FOOF, as dear as any method but corrected FedPM, trains on, with one thread."""
    classes = {"cifar10": 10, "cifar100": 100}[dataset]
    threads, device = torch.get_num_threads(), pick_device("auto")
    torch.set_num_threads(1)
    try:
        model = build_model(model_name, (3, 32, 32), classes, seed=0).to(device)
        optimizer = FOOF(model, lr=1e-3, refresh_interval=5, inverse_interval=10)
        images = torch.randn(64, 3, 32, 32, device=device)
        labels = torch.zeros(64, dtype=torch.long, device=device)
        started, steps = time.perf_counter(), 0
        while steps < 10 or time.perf_counter() - started < seconds:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            steps += 1
        return steps * 64 / (time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)


def rows_of(runs: Iterable[Run]) -> list[Row]:
    """One row a method and case, in the order of the runs."""
    grouped: dict[Case, dict[str, list[Run]]] = {}
    for run in runs:
        grouped.setdefault(case_of(run), {}).setdefault(method_of(run), []).append(run)
    return [
        _row(case, method, own, methods.get(_BASELINE, []))
        for case, methods in grouped.items()
        for method, own in methods.items()
    ]


def case_of(run: Run) -> Case:
    """What runs that are compared have in common."""
    of = run.settings
    version = Version(int(of["max-train-examples"]), int(of["num-server-rounds"]), int(of["local-epochs"]))
    return Case(data_of(run), float(of["alpha"]), version, run.nodes, float(of["fraction-train"]))


def method_of(run: Run) -> str:
    """Its name in ``METHODS``."""
    algorithm, codec = str(run.settings["algorithm"]), run.settings["codec"]
    return f"{algorithm}:{codec}" if algorithm == "fedpm" and codec != Config().codec else algorithm


def _row(case: Case, method: str, runs: Sequence[Run], baseline: Sequence[Run]) -> Row:
    failed = sum(bool(run.failure) for run in runs)
    algorithm, _, codec = method.partition(":")
    row: dict[str, str | int | float | None] = {
        "dataset": case.dataset,
        "alpha": case.alpha,
        "method": algorithm,
        "codec": codec or (str(runs[0].settings["codec"]) if algorithm.startswith("fedpm") else None),
        "images": case.version.images or None,
        "rounds": case.version.rounds,
        "local_epochs": case.version.epochs,
        "clients": case.nodes,
        "participation": case.participation,
        "seeds": len(runs),
        "failed": failed,
        "paper": _of_the_paper(case, method),
    }
    if failed:
        others = [run.rounds[-1]["test-accuracy"] for run in runs if not run.failure]
        return {
            **row,
            "accuracy_mean": None,
            "accuracy_of_others": rounded(statistics.fmean(others)) if others else None,
        }
    accuracies = [run.rounds[-1]["test-accuracy"] for run in runs]
    return {
        **row,
        # With more digits than the pages print: what is rounded twice may be off by one.
        "accuracy_mean": round(statistics.fmean(accuracies), 6),
        "accuracy_std": round(statistics.stdev(accuracies), 6) if len(runs) > 1 else None,
        **_beside(runs, {run.settings["seed"]: run for run in baseline if not run.failure}),
        "uplink_mb": rounded(statistics.fmean(_spent(run, "uplink-bytes")[-1] / 1e6 for run in runs)),
        "local_steps": rounded(statistics.fmean(_spent(run, "local-steps")[-1] for run in runs)),
        "seconds": rounded(statistics.fmean(_spent(run, seconds_key(run))[-1] for run in runs)),
    }


def _of_the_paper(case: Case, method: str) -> float | None:
    """What the paper has for this case, in 100 rounds on all images."""
    if (case.nodes, case.participation, case.version.epochs) != (NODES, 1.0, 5):
        return None
    return PAPER.get((case.dataset, case.alpha), {}).get(method)


def _beside(runs: Sequence[Run], baseline: Mapping[Value, Run]) -> Mapping[str, float | None]:
    """What is told relative to FedAvg's run of the same seed."""
    pairs = [(run, baseline[run.settings["seed"]]) for run in runs if run.settings["seed"] in baseline]
    if len(pairs) < len(runs):
        return {"rounds_to_fedavg": None, "at_fedavgs_mb": None, "at_fedavgs_seconds": None}
    reached = [rounds_to(run.rounds, other.rounds[-1]["test-accuracy"]) for run, other in pairs]
    there = [number for number in reached if number is not None]

    def at(key_of: Callable[[Run], str]) -> float:
        return rounded(
            statistics.fmean(
                _accuracy_at(run.rounds, _spent(run, key_of(run)), _spent(other, key_of(other))[-1])
                for run, other in pairs
            )
        )

    return {
        "rounds_to_fedavg": rounded(statistics.fmean(there)) if len(there) == len(runs) else None,
        "at_fedavgs_mb": at(lambda _: "uplink-bytes"),
        "at_fedavgs_seconds": at(seconds_key)
        if len({_machine(run) for pair in pairs for run in pair}) == 1
        else None,
    }


def _machine(run: Run) -> tuple[str, ...]:
    """Seconds of different ones are no comparison."""
    return tuple(str(run.provenance[key]) for key in ("processor", "cores", "accelerator"))


def seconds_key(run: Run) -> str:
    """Which seconds count: a core's, which no run beside it takes away; on a GPU the clock's."""
    return "cpu-seconds" if run.provenance["accelerator"] == "none" else "seconds"


def _spent(run: Run, key: str) -> list[float]:
    """Up to each round, the first being 0."""
    return list(accumulate(0.0 if math.isnan(row[key]) else row[key] for row in run.rounds))


def _accuracy_at(rounds: Rounds, spent: Sequence[float], budget: float) -> float:
    """When the budget is spent, on the line between two rounds; after the last round, if there is more of it."""
    return float(np.interp(budget, spent, [row["test-accuracy"] for row in rounds]))


if __name__ == "__main__":
    sys.exit(main())
