"""What every benchmark ends with: a table to read, JSON to keep, one line ``RESULT {json}``."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .provenance import provenance

Row = Mapping[str, str | int | float | None]


def publish(name: str, rows: Sequence[Row], output: Path | None = None, foot: str = "", **more: Any) -> None:
    """Print the rows and a foot, write both with where they come from to ``output``, print the line RESULT."""
    print(format_table(rows) + (f"\n\n{foot}" if foot else ""), flush=True)
    document = {"benchmark": name, "provenance": provenance(), **more, "foot": foot, "rows": rows}
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(f"{to_json(document, indent=1)}\n", encoding="utf-8")
    print(f"RESULT {to_json(document)}", flush=True)


def to_json(document: Any, indent: int | None = None) -> str:
    """As JSON, which has no NaN and no infinity: null.

    >>> to_json({"± seconds": [1.5, math.nan]})
    '{"± seconds": [1.5, null]}'
    """
    return json.dumps(_with_null(document), indent=indent, ensure_ascii=False, allow_nan=False)


def _with_null(document: Any) -> Any:
    if isinstance(document, Mapping):
        return {key: _with_null(value) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return [_with_null(value) for value in document]
    return None if isinstance(document, float) and not math.isfinite(document) else document


def format_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table; a row without a column, or with nothing in it, has – there.

    >>> print(format_table([{"method": "fedpm", "accuracy": 0.5}, {"method": "", "accuracy": None}]))
    | method | accuracy |
    | ------ | -------- |
    | fedpm  | 0.5      |
    | –      | –        |
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    return "\n".join([lines[0], "| " + " | ".join("-" * width for width in widths) + " |", *lines[1:]])


def rounded(value: float) -> float:
    """Four digits: more would not be read."""
    return float(f"{value:.4g}")


def with_times_fedavg(rows: Sequence[Row]) -> list[Row]:
    """The rows, each with its ``seconds`` by those of FedAvg with as many clients; None: there is no such row.

    >>> rows = [{"method": m, "clients": 2, "seconds": s} for m, s in (("fedpm", 3.0), ("fedavg", 2.0))]
    >>> [row["times_fedavg"] for row in with_times_fedavg(rows)]
    [1.5, 1.0]
    """
    seconds = {row["clients"]: _number(row["seconds"]) for row in rows if row["method"] == "fedavg"}
    return [
        {
            **row,
            "times_fedavg": rounded(_number(row["seconds"]) / seconds[row["clients"]])
            if row["clients"] in seconds
            else None,
        }
        for row in rows
    ]


def _number(value: str | int | float | None) -> float:
    assert isinstance(value, int | float)
    return value


def _cell(value: str | int | float | None) -> str:
    return "–" if value in (None, "") else f"{value:.4g}" if isinstance(value, float) else str(value)
