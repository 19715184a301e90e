"""What every benchmark ends with: a table to read, JSON to keep, one line ``RESULT {json}``."""

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

Row = Mapping[str, str | int | float | None]


def publish(name: str, rows: Sequence[Row], output: Path | None = None, foot: str = "", **more: Any) -> None:
    """Print the rows and a foot, write the rows with command and machine to ``output``, print the line RESULT."""
    print(format_table(rows) + (f"\n\n{foot}" if foot else ""), flush=True)
    document = {"benchmark": name, "command": " ".join(sys.argv[1:]), "machine": machine(), **more, "rows": rows}
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(document, indent=1), encoding="utf-8")
    print(f"RESULT {json.dumps(document)}", flush=True)


def format_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table; a row without a column has – there.

    >>> print(format_table([{"method": "fedpm", "accuracy": 0.5}, {"method": "fedavg", "accuracy": None}]))
    | method | accuracy |
    | ------ | -------- |
    | fedpm  | 0.5      |
    | fedavg | –        |
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    return "\n".join([lines[0], "| " + " | ".join("-" * width for width in widths) + " |", *lines[1:]])


def machine() -> dict[str, str | int]:
    """Where the figures come from."""
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count() or 0,
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cell(value: str | int | float | None) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
