"""The sections of docs/results.md and README.md as text: a table, a picture's place, where its runs are from."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedpm_flwr.config import Value

from . import ablation
from .experiments import NODES, Version
from .runs import Run
from .table import Row, format_table
from .vision import Case, case_of, method_of, rows_of

_SWEPT: Mapping[str, Callable[[Case], str]] = {
    "epochs": lambda case: (
        f"{case.version.rounds * case.version.epochs} local epochs in all, in more rounds or fewer"
    ),
    "alpha": lambda _: "heterogeneity",
    "clients": lambda _: "number of clients",
    "participation": lambda _: "share of the clients in a round",
}
LABELS: Mapping[str, Callable[[Case], str]] = {
    "epochs": lambda case: f"{case.version.rounds} rounds × {case.version.epochs}",
    "alpha": lambda case: f"α = {case.alpha:g}",
    "clients": lambda case: f"{case.nodes} clients",
    "participation": lambda case: f"{case.participation:.0%}",
}
_TITLES = {"cifar10": "CIFAR-10, LeNet", "cifar100": "CIFAR-100, ResNet18-GN"}
_NOT_EXACT = (
    "The CIFAR-10 file has all labels and the order exact; 59,907 of its 60,000 images are bit-exact, 93 "
    "(73 training, 20 test; 88 ships and 5 horses) are decoded JPEGs, off by about 6 grey levels on average."
)


@dataclass(frozen=True)
class Sweep:
    """Cases that differ in one thing, and the methods that were run in all of them."""

    kind: str
    cases: tuple[Case, ...]
    methods: tuple[str, ...]


def name_of(case: Case) -> str:
    """For a file and a block."""
    version = case.version
    name = (
        f"{case.dataset}-alpha{case.alpha}-images{version.images or 'all'}-rounds{version.rounds}"
        f"-epochs{version.epochs}-clients{case.nodes}"
    )
    return (name if case.participation == 1.0 else f"{name}-share{case.participation}").replace(".", "_")


def sweep_name(sweep: Sweep) -> str:
    """For a file."""
    return f"{name_of(sweep.cases[0])}-by-{sweep.kind}"


def headline(cases: Mapping[Case, Sequence[Run]]) -> str:
    """The version that most methods were run in, of several that with most runs: all its α in one table."""
    versions: dict[tuple[str, Version], list[Run]] = {}
    for case, own in cases.items():
        if (case.nodes, case.participation) == (NODES, 1.0):
            versions.setdefault((case.dataset, case.version), []).extend(own)
    if not versions:
        return ""
    (dataset, version), chosen = max(
        versions.items(), key=lambda pair: (len({method_of(run) for run in pair[1]}), len(pair[1]))
    )
    rows = rows_of(chosen)
    alphas = sorted({float(str(row["alpha"])) for row in rows}, reverse=True)
    counts = {
        alpha: len({run.settings["seed"] for run in chosen if case_of(run).alpha == alpha}) for alpha in alphas
    }
    told = " and ".join(f"{count} at α = {alpha:g}" for alpha, count in counts.items())
    about = (
        f"{_TITLES[dataset]}, {_version(version)}, {NODES} clients; test accuracy, mean ± standard deviation over "
        f"seeds ({told}). The paper's are of 100 rounds on all images, with a CNN that it does not tell."
        "\n\n"
    )
    table: list[Row] = []
    for name in dict.fromkeys(_name(row) for row in rows):
        named = {row["alpha"]: row for row in rows if _name(row) == name}
        table.append(
            {"method": name}
            | {f"α = {alpha:g}": _accuracy(named[alpha]) if alpha in named else None for alpha in alphas}
            | {
                f"the paper's, α = {alpha:g}": named[alpha]["paper"] if alpha in named else None
                for alpha in alphas
            }
        )
    return f"{about}{format_table(table)}\n"


def section(case: Case, runs: Sequence[Run]) -> str:
    """A case: a row a method."""
    title = f"### {_TITLES[case.dataset]}, α = {case.alpha:g}: {_version(case.version)}, {case.nodes} clients"
    if case.participation != 1.0:
        title += f", {case.participation:.0%} of them in a round"
    table = format_table([_printed(row) for row in rows_of(runs)])
    picture = f"![Test accuracy](images/{name_of(case)}.png)"
    return "\n".join([title, "", table, "", picture, "", _provenance("vision", runs), ""])


def sweep_section(sweep: Sweep, runs: Sequence[Run]) -> str:
    """A sweep: a row a method, a column for each of what was varied."""
    first = sweep.cases[0]
    told = {
        "epochs": f"α = {first.alpha:g}, {_images(first.version)}, {first.nodes} clients",
        "alpha": f"{_version(first.version)}, {first.nodes} clients",
        "clients": f"α = {first.alpha:g}, {_version(first.version)}",
        "participation": f"α = {first.alpha:g}, {_version(first.version)}, {first.nodes} clients",
    }[sweep.kind]
    accuracies = accuracies_of(sweep, runs)
    labels = [LABELS[sweep.kind](case) for case in sweep.cases]
    table: list[Row] = [
        {
            "method": f"`{method}`",
            **{label: _mean_and_deviation(c) for label, c in zip(labels, columns, strict=True)},
        }
        for method, columns in accuracies.items()
    ]
    own = runs_of(sweep, runs)
    picture = f"![Test accuracy](images/{sweep_name(sweep)}.png)"
    title = f"### {_TITLES[first.dataset]}: {_SWEPT[sweep.kind](first)}"
    return "\n".join(
        [title, "", f"{told}.", "", format_table(table), "", picture, "", _provenance("vision", own), ""]
    )


def accuracies_of(sweep: Sweep, runs: Iterable[Run]) -> dict[str, list[list[float]]]:
    """By method, and by what was varied: the last test accuracies, over the same seeds; NaN: the run failed."""
    own = runs_of(sweep, runs)

    def accuracies(method: str, case: Case) -> list[float]:
        found = [run for run in own if (method_of(run), case_of(run)) == (method, case)]
        return [math.nan if run.failure else run.rounds[-1]["test-accuracy"] for run in found]

    return {method: [accuracies(method, case) for case in sweep.cases] for method in sweep.methods}


def runs_of(sweep: Sweep, runs: Iterable[Run]) -> list[Run]:
    """With the seeds that all its methods were run with in all its cases."""
    own = [run for run in runs if case_of(run) in sweep.cases and method_of(run) in sweep.methods]
    seeds: dict[tuple[str, Case], set[Value]] = {}
    for run in own:
        seeds.setdefault((method_of(run), case_of(run)), set()).add(run.settings["seed"])
    common = set.intersection(*seeds.values())
    return [run for run in own if run.settings["seed"] in common]


def _mean_and_deviation(values: Sequence[float]) -> str:
    others = [value for value in values if not math.isnan(value)]
    if len(others) < len(values):
        told = f", the others {statistics.fmean(others):.3f}" if others else ""
        return f"{len(values) - len(others)} of {len(values)} runs failed{told}"
    mean = f"{statistics.fmean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def _version(version: Version) -> str:
    epochs = f"{version.epochs} local epoch{'s' if version.epochs > 1 else ''}"
    return f"{_images(version)}, {version.rounds} rounds of {epochs}"


def _images(version: Version) -> str:
    return f"the first {version.images:,} images" if version.images else "all images"


def _printed(row: Row) -> Row:
    return {
        "method": _name(row),
        "test accuracy": _accuracy(row),
        "seeds": row["seeds"],
        "the paper's (100 rounds, all images)": row["paper"],
        "rounds to FedAvg's": row.get("rounds_to_fedavg"),
        "at FedAvg's MB": row.get("at_fedavgs_mb"),
        "at FedAvg's seconds": row.get("at_fedavgs_seconds"),
        "uplink, MB": row.get("uplink_mb"),
        "seconds": row.get("seconds"),
    }


def _name(row: Row) -> str:
    return f"`{row['method']}`" + (", codec `auto`" if row["codec"] == "auto" else "")


def _accuracy(row: Row) -> str:
    mean, deviation = row["accuracy_mean"], row.get("accuracy_std")
    if not isinstance(mean, float):
        others = row.get("accuracy_of_others")
        told = f", the others {others:.3f}" if isinstance(others, float) else ""
        return f"{row['failed']} of {row['seeds']} runs failed{told}"
    return f"{mean:.3f} ± {deviation:.3f}" if isinstance(deviation, float) else f"{mean:.3f}"


def _provenance(benchmark: str, runs: Sequence[Run]) -> str:
    seeds = ", ".join(str(seed) for seed in sorted({int(run.settings["seed"]) for run in runs}))
    exact = f" {_NOT_EXACT}" if any(run.settings["dataset"] == "npz:cifar10.npz" for run in runs) else ""
    return _origin(benchmark, [run.provenance for run in runs], f"Seeds {seeds}; ", exact)


def _origin(benchmark: str, provenances: Sequence[Mapping[str, Any]], before: str = "", after: str = "") -> str:
    """Where and when, and the commands beneath."""

    def told(key: str) -> str:
        return ", ".join(sorted({str(of[key]) for of in provenances}))

    commands = sorted({f"    python -m benchmarks.{benchmark} {of['command']}".rstrip() for of in provenances})
    return (
        f"{before}{told('date')}; commit {told('commit')}; torch {told('torch')}, Flower {told('flwr')}, "
        f"Python {told('python')}; {told('processor')}, {told('cores')} cores, "
        f"accelerator: {told('accelerator')}.{after}\n\n"
    ) + "\n".join(commands)


def published(document: Mapping[str, Any], picture: str) -> str:
    """What a benchmark has written by --output: its table, its foot, its picture, where they are from."""
    parts = [
        format_table([_with_deviations(row) for row in document["rows"]]),
        document["foot"],
        f"![{document['benchmark']}]({picture})" if document.get("curves") else "",
        _origin(document["benchmark"], [document["provenance"]]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _with_deviations(row: Row) -> Row:
    """The same, with x_mean and x_std in one column x.

    >>> _with_deviations({"method": "fedpm", "accuracy_mean": 0.5, "accuracy_std": 0.01})
    {'method': 'fedpm', 'accuracy': '0.5 ± 0.01'}
    """
    merged: dict[str, str | int | float | None] = {}
    for key, value in row.items():
        name = key.removesuffix("_mean")
        deviation = row.get(f"{name}_std")
        if not key.endswith("_std"):
            merged[name] = value if deviation is None else f"{value:.4g} ± {deviation:.2g}"
    return merged


def ablation_section(runs: Sequence[Run]) -> str:
    """The table of ``benchmarks.ablation``."""
    table: list[Row] = [
        {
            "variant": row["variant"],
            "settings": f"`{row['settings']}`" if row["settings"] else None,
            "seeds": row["seeds"],
            "held-out accuracy": _accuracy(row),
            "minus unchanged, points": _points(row),
        }
        for row in ablation.rows_of(runs)
    ]
    return f"{format_table(table)}\n\n{_provenance('ablation', runs)}\n"


def _points(row: Row) -> str:
    mean, deviation = row["minus_base_mean"], row["minus_base_std"]
    return f"{mean:+.1f} ± {deviation:.1f}" if isinstance(deviation, float) else f"{mean:+.1f}"
