"""Pictures of runs that are kept (``runs.Store``), for docs/results.md. Each tells in its file of which runs."""

import hashlib
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

from .panels import save
from .runs import Run
from .vision import method_of, seconds_key

_AXES = (
    ("round", "round"),
    ("uplink-bytes", "MB from clients"),
    ("local-steps", "local steps a client"),
    ("s", "s"),
)


def mark_of(runs: Sequence[Run]) -> str:
    """A hash of what the runs were and gave."""
    told = sorted(json.dumps([dict(run.settings), run.nodes, run.rounds], sort_keys=True) for run in runs)
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


def plot_curves(runs: Sequence[Run], path: Path) -> None:
    """Mean test accuracy against rounds, bytes, local steps and seconds, a line a method."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    methods: dict[str, list[Run]] = {}
    for run in runs:
        failed = sum(bool(other.failure) for other in runs if method_of(other) == method_of(run))
        if not run.failure:
            name = f"{method_of(run)}, but {failed} failed" if failed else method_of(run)
            methods.setdefault(name, []).append(run)
    figure = Figure(figsize=(14, 4), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(1, len(_AXES), sharey=True), _AXES, strict=True):
        axes.set_prop_cycle(color=[colormaps["tab20"](number) for number in (*range(0, 20, 2), *range(1, 20, 2))])
        for method, own in methods.items():
            at = [statistics.fmean(column) for column in zip(*(_along(run, key) for run in own), strict=True)]
            curves = [[row["test-accuracy"] for row in run.rounds] for run in own]
            (line,) = axes.plot(
                at, [statistics.fmean(c) for c in zip(*curves, strict=True)], label=method, marker="."
            )
            if len(own) > 1:
                low, high = ([pick(c) for c in zip(*curves, strict=True)] for pick in (min, max))
                axes.fill_between(at, low, high, color=line.get_color(), alpha=0.12)
        axes.set(xlabel="seconds of one core" if key == "s" else label)
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel="test accuracy")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper")
    save(figure, path, mark_of(runs))


def _along(run: Run, key: str) -> list[float]:
    """What had been spent after each round."""
    if key == "round":
        return [row["round"] for row in run.rounds]
    of = seconds_key(run) if key == "s" else key
    scale = 1e-6 if key == "uplink-bytes" else 1.0
    return [scale * total for total in accumulate(row[of] if row[of] == row[of] else 0.0 for row in run.rounds)]


def plot_sweep(
    accuracies: Mapping[str, Sequence[Sequence[float]]], ticks: Sequence[str], path: Path, runs: Sequence[Run]
) -> None:
    """Mean test accuracy with the least and the largest, by method and by what was varied; NaN is left out."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    places = range(len(ticks))
    for method, columns in accuracies.items():
        kept = [[value for value in column if value == value] or [math.nan] for column in columns]  # not failed
        means = [statistics.fmean(column) for column in kept]
        below = [mean - min(column) for mean, column in zip(means, kept, strict=True)]
        above = [max(column) - mean for mean, column in zip(means, kept, strict=True)]
        axes.errorbar(places, means, yerr=[below, above], label=method, marker=".", capsize=3)
    axes.set_xticks(places, ticks)
    axes.set(ylabel="test accuracy")
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path, mark_of(runs))
