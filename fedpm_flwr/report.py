"""What a run tells while it goes, and leaves behind: lines, tables, the model, a plot."""

import csv
import json
import math
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from .config import Config

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "fedpm | "
"""Starts every line that a run prints, so that it can be told from Flower's own."""

_MEGABYTE = 1e6
Row = dict[str, int | float]


class RunReport:
    """One run's folder: config.toml at once, metrics.csv and metrics.json as rounds end,
    model.safetensors and curves.png at the end.

    Raises:
        OSError: the folder cannot be written to.
    """

    def __init__(self, config: Config) -> None:
        self.folder = _folder(config)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.toml").write_text(config.to_toml(), encoding="utf-8")
        self.rows: list[Row] = []
        self._config = config
        self._started = self._round_started = time.monotonic()
        self._say(f"{config.algorithm} on {config.dataset}, {config.num_server_rounds} rounds -> {self.folder}")

    def add_round(self, server_round: int, metrics: Mapping[str, int | float]) -> None:
        """Keep and print one round's metrics; round 0 is the initial model.

        ``metrics`` must hold test-accuracy, test-loss, clients (how many replies were used) and
        uplink-bytes (of all of these together).
        """
        now = time.monotonic()
        seconds, self._round_started = now - self._round_started, now
        row: Row = {**metrics, "round": server_round, "seconds": round(seconds, 3)}
        self.rows.append(row)
        self._write_rows()
        self._say(self._line(row))

    def finish(self, state: "Mapping[str, Tensor]") -> None:
        """Write the model and the plot, print the summary."""
        # Copies: safetensors refuses tensors that share memory, as tied weights do.
        # Imported here: what only watches a run, as scripts/simulate.py does, need not wait for torch.
        import torch
        from safetensors.torch import save_file

        copies = {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in state.items()}
        save_file(copies, self.folder / "model.safetensors")
        plot_curves(self.rows, f"{self._config.algorithm} on {self._config.dataset}", self.folder / "curves.png")
        best = max(self.rows, key=lambda row: row["test-accuracy"])
        last = self.rows[-1]
        uplink = sum(row["uplink-bytes"] for row in self.rows) / _MEGABYTE
        self._say(
            f"done: test accuracy {last['test-accuracy']:.4f} (best {best['test-accuracy']:.4f} in round "
            f"{best['round']}), uplink {uplink:.1f} MB, {time.monotonic() - self._started:.0f} s"
        )
        self._say(f"results in {self.folder}")

    def _write_rows(self) -> None:
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        with (self.folder / "metrics.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)
        (self.folder / "metrics.json").write_text(json.dumps([_finite(row) for row in self.rows], indent=1))

    def _line(self, row: Row) -> str:
        rounds = self._config.num_server_rounds
        done = row["round"]
        left = seconds_left(self.rows, rounds)
        parts = [
            f"round {done:>{len(str(rounds))}}/{rounds}",
            f"accuracy {row['test-accuracy']:.4f}",
            f"loss {row['test-loss']:.4f}",
            f"clients {row['clients']}",
            f"uplink {row['uplink-bytes'] / _MEGABYTE:.2f} MB",
            f"{row['seconds']:.1f} s",
        ]
        return "  ".join(parts if left is None else [*parts, f"{left:.0f} s left"])

    @staticmethod
    def _say(line: str) -> None:
        print(PREFIX + line, flush=True)


def _finite(row: Row) -> dict[str, int | float | None]:
    """JSON has no NaN and no infinity: null."""
    return {key: value if math.isfinite(value) else None for key, value in row.items()}


def seconds_left(rows: list[Row], rounds: int) -> float | None:
    """Seconds to go, from the rounds so far but the first two, which include starting up; None: unknown."""
    timed = [row["seconds"] for row in rows[2:]]
    return (rounds - rows[-1]["round"]) * sum(timed) / len(timed) if timed else None


def plot_curves(rows: list[Row], title: str, path: Path) -> None:
    """Test accuracy and loss against rounds, as a PNG."""
    # Without pyplot: a Figure of its own opens no window and leaves no global state.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    rounds = [row["round"] for row in rows]
    for axes, key in zip(figure.subplots(1, 2), ("test-accuracy", "test-loss"), strict=True):
        axes.plot(rounds, [row[key] for row in rows], marker=".")
        axes.set(xlabel="round", ylabel=key.replace("-", " "))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def _folder(config: Config) -> Path:
    if config.output:
        return Path(config.output)
    return Path.cwd() / "runs" / f"{datetime.now():%Y%m%d-%H%M%S}-{config.algorithm}"
