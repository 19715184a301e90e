"""What a run tells while it goes, and leaves behind: lines, tables, the model, a plot."""

import csv
import io
import json
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import Config, ConfigError
from .extras import needs

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "fedpm | "
"""Starts every line that a run prints, so that it can be told from Flower's own."""

_MEGABYTE = 1e6
_MAX_REASON = 300
"""Longest reason that a warning repeats: part of it may be a stranger's text."""
_HEAD = 100
"""So much of it is the beginning of a longer one, the rest its end: where a traceback says what went wrong."""
_LOOKED_AT = 10_000
"""So much of its beginning and of its end, before colours are taken out, which may be all of it."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
Row = dict[str, int | float]


class RunReport:
    """One run's folder: config.toml at once, metrics.csv and metrics.json as rounds end (and, with
    ``tensorboard=true``, TensorBoard's events), model.safetensors and curves.png at the end.

    Raises:
        OSError: the folder cannot be written to.
        ConfigError: TensorBoard is asked for, and not installed.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self._board = _tensorboard(self.folder) if config.tensorboard else None
        (self.folder / "config.toml").write_text(config.to_toml(), encoding="utf-8")
        self.rows: list[Row] = []
        self._config = config
        self._kept: int | None = None
        self._started = self._round_started = time.monotonic()
        self.say(f"{config.algorithm} on {config.dataset}, {config.num_server_rounds} rounds -> {self.folder}")

    def add_round(self, server_round: int, metrics: Mapping[str, int | float]) -> Row:
        """Keep and print one round's metrics, and return them as a row; round 0 is the initial model.

        ``metrics`` must hold test-accuracy, test-loss, clients (how many replies were used) and
        uplink-bytes (of all of these together).
        """
        now = time.monotonic()
        seconds, self._round_started = now - self._round_started, now
        row: Row = {**metrics, "round": server_round, "seconds": round(seconds, 3)}
        self.rows.append(row)
        try:
            self._write_rows(row)
        except OSError as error:  # all rows are written again after the next round
            self.say(f"round {server_round}: metrics could not be written, the run goes on: {error}")
        self.say(self._line(row))
        return row

    def keep(self, state: "Mapping[str, Tensor]", server_round: int) -> None:
        """Write the model of a round, in place of the one before: a run may be killed at any time."""
        try:
            self._write_model(state, server_round)
        except OSError as error:
            self.say(f"round {server_round}: the model could not be written, the run goes on: {error}")

    def close(self) -> None:
        """Draw the plot, and say which model there is."""
        label = f"{self._config.algorithm} on {self._config.dataset}"
        plot_curves({label: [self.rows]}, self.folder / "curves.png")
        if self._kept is not None:
            self.say(f"the model of round {self._kept} is in {self.folder / 'model.safetensors'}")

    def finish(self, state: "Mapping[str, Tensor]") -> None:
        """Write the model and the plot, print the summary.

        Raises:
            OSError: the model cannot be written.
        """
        last = self.rows[-1]
        self._write_model(state, int(last["round"]))
        self.close()
        best = max(self.rows, key=lambda row: row["test-accuracy"])
        uplink = sum(row["uplink-bytes"] for row in self.rows) / _MEGABYTE
        self.say(
            f"done: test accuracy {last['test-accuracy']:.4f} (best {best['test-accuracy']:.4f} in round "
            f"{best['round']}), uplink {uplink:.1f} MB, {time.monotonic() - self._started:.0f} s"
        )
        self.say(f"results in {self.folder}")

    @staticmethod
    def say(line: str) -> None:
        """Print a line that can be told from Flower's own."""
        print(PREFIX + line, flush=True)

    def _write_model(self, state: "Mapping[str, Tensor]", server_round: int) -> None:
        # Imported here: what only watches a run, as scripts/simulate.py does, need not wait for torch.
        from .durable import write_tensors

        # No further text in it: safetensors writes texts in random order, and equal models are to be equal bytes.
        write_tensors(self.folder / "model.safetensors", state, {}, private=False)
        self._kept = server_round

    def _write_rows(self, newest: Row) -> None:
        if self._board is not None:
            for name, value in newest.items():
                if name != "round":
                    self._board.add_scalar(name, value, newest["round"])
            self._board.flush()
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, columns)
        writer.writeheader()
        writer.writerows(self.rows)
        _replace(self.folder / "metrics.csv", table.getvalue())
        _replace(self.folder / "metrics.json", json.dumps([_finite(row) for row in self.rows], indent=1))

    def _line(self, row: Row) -> str:
        rounds = self._config.num_server_rounds
        done = row["round"]
        left = seconds_left(self.rows, rounds)
        parts = [
            f"round {done:>{len(str(rounds))}}/{rounds}",
            f"accuracy {row['test-accuracy']:.4f}",
            f"loss {row['test-loss']:.4f}",
            f"clients {row['clients']}{_of_clients(row)}",
            f"uplink {row['uplink-bytes'] / _MEGABYTE:.2f} MB",
            f"{row['seconds']:.1f} s",
        ]
        return "  ".join(parts if left is None else [*parts, f"{left:.0f} s left"])


def one_line(reason: object) -> str:
    """A reason on one line, and no longer than anybody reads."""
    text = str(reason)
    if len(text) > 2 * _LOOKED_AT:
        text = text[:_LOOKED_AT] + text[-_LOOKED_AT:]
    text = _COLOUR.sub("", text)
    if len(text) > _MAX_REASON:
        text = f"{text[:_HEAD]} … {text[_HEAD - _MAX_REASON :]}"
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _tensorboard(folder: Path) -> Any:
    """Raises ConfigError if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            f"tensorboard=true is not usable here: {error}; pip install tensorboard, or leave it out"
        ) from error
    return SummaryWriter(str(folder / "tensorboard"))


def _replace(path: Path, text: str) -> None:
    """Write a file that is never seen half written."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8", newline="")
    os.replace(part, path)


def _finite(row: Row) -> dict[str, int | float | None]:
    """JSON has no NaN and no infinity: null."""
    return {key: value if math.isfinite(value) else None for key, value in row.items()}


def seconds_left(rows: list[Row], rounds: int) -> float | None:
    """Seconds to go, from the rounds so far but the first two, which include starting up; None: unknown."""
    timed = [row["seconds"] for row in rows[2:]]
    return (rounds - rows[-1]["round"]) * sum(timed) / len(timed) if timed else None


SPREAD = ("worst", "median", "best")


def spread(name: str, values: list[float], best: Callable[[list[float]], float]) -> Row:
    """Worst, median and best of the clients' values, ``best`` being ``max`` or ``min``; of none: none.

    NaN is the worst of all.
    """
    if not values:
        return {}
    sign = -1.0 if best is max else 1.0
    ranked = sorted(values, key=lambda value: (math.isnan(value), sign * value))
    middle = (ranked[(len(ranked) - 1) // 2] + ranked[len(ranked) // 2]) / 2
    return {f"{name}-{which}": value for which, value in zip(SPREAD, (ranked[-1], middle, ranked[0]), strict=True)}


def _of_clients(row: Row) -> str:
    names = {"client-accuracy": "accuracy", "personal-accuracy": "of their own models"}
    told = {key: what for key, what in names.items() if f"{key}-worst" in row}
    if not told and "train-accuracy-worst" in row:
        told = {"train-accuracy": "training accuracy"}
    spreads = {what: " … ".join(f"{row[f'{key}-{which}']:.2f}" for which in SPREAD) for key, what in told.items()}
    parts = [f"{what} {values}" for what, values in spreads.items()]
    return f" ({', '.join(parts)})" if parts else ""


def plot_curves(methods: Mapping[str, Sequence[Sequence[Row]]], path: Path) -> None:
    """Test accuracy against rounds and against uplink, test loss against rounds, as a PNG.

    ``methods``: by label, the rows of one run per seed; lines are means, bands go from least to most.
    """
    # Without pyplot: a Figure of its own opens no window and leaves no global state.
    with needs("tasks"):
        from matplotlib.figure import Figure

    # Margins of a fixed size: fitting them to the text takes as long again as drawing, at the end of every run.
    columns = 3  # of the legend
    legend_inches = 0.2 + 0.21 * -(-len(methods) // columns)
    height = 3.4 + legend_inches
    figure = Figure(figsize=(12, height))
    margins = {"left": 0.07, "right": 0.985, "bottom": 0.5 / height, "top": 1 - legend_inches / height}
    panels = figure.subplots(1, 3, gridspec_kw={**margins, "wspace": 0.3})
    for axes, (x, y) in zip(
        panels,
        (("round", "test-accuracy"), ("uplink-mb", "test-accuracy"), ("round", "test-loss")),
        strict=True,
    ):
        for label, runs in methods.items():
            _plot_method(axes, label, [_with_uplink(run) for run in runs], x, y)
        axes.set(xlabel="uplink, MB in all" if x == "uplink-mb" else x, ylabel=y.replace("-", " "))
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="upper center", ncols=columns)
    figure.savefig(path, dpi=100)


def _plot_method(axes: Any, label: str, runs: Sequence[Sequence[Row]], x: str, y: str) -> None:
    """One line: the mean over the rounds that all runs have; a band if there are several runs."""
    rounds = list(zip(*runs, strict=False))
    at = [statistics.fmean(row[x] for row in rows) for rows in rounds]
    (line,) = axes.plot(at, [statistics.fmean(row[y] for row in rows) for rows in rounds], marker=".", label=label)
    if len(runs) > 1:
        low, high = ([pick(row[y] for row in rows) for rows in rounds] for pick in (min, max))
        axes.fill_between(at, low, high, color=line.get_color(), alpha=0.2)


def _with_uplink(rows: Sequence[Row]) -> list[Row]:
    """The rows with the megabytes sent up to then."""
    sent = accumulate(row["uplink-bytes"] for row in rows)
    return [{**row, "uplink-mb": total / _MEGABYTE} for row, total in zip(rows, sent, strict=True)]


def output_folder(config: Config) -> Path:
    """Where a run leaves its results: as it is configured, or under ``runs/`` by time and algorithm.

    Raises:
        ConfigError: another run has left checkpoints there, which would be taken for this one's.
    """
    if config.output or config.resume:
        folder = Path(config.output or config.resume)
        is_own = config.resume and folder.resolve() == Path(config.resume).resolve()
        if not is_own and any(folder.glob("checkpoints/round-*.safetensors")):
            name = f"output={config.output!r}"
            raise ConfigError(f"{name} holds checkpoints of a run: resume it, or begin another in another folder")
        return folder
    return Path.cwd() / "runs" / f"{datetime.now():%Y%m%d-%H%M%S}-{config.algorithm}"
