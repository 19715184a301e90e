"""The picture beside a benchmark's table: lines in panels, as its JSON keeps them under ``curves``."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from .table import to_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARK = "Source"
_STYLES = ("-", "--", ":", "-.")


class Line(NamedTuple):
    """As a pair of lists in JSON, with None where a number is not finite."""

    x: Sequence[float | None]
    y: Sequence[float | None]


class Panel(TypedDict):
    """Lines by label, as ``fedpm K=3``: the first word has a colour, the rest a style, in all panels alike."""

    title: str
    x: str
    y: str
    decades: Sequence[float] | None
    """The ends of a logarithmic axis y; None: it is linear, and ends where the lines do."""
    lines: Mapping[str, Line]


def read_panels(curves: Any) -> list[Panel]:
    """What ``curves`` is in a benchmark's JSON.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is something else.
    """
    panels = []
    for told in curves:
        lines = {label: Line(*line) for label, line in told["lines"].items()}
        for label, (x, y) in lines.items():
            if len(x) != len(y):
                raise ValueError(f"{label}: {len(x)} values of x, and {len(y)} of y")
        panels.append(Panel(title=told["title"], x=told["x"], y=told["y"], decades=told["decades"], lines=lines))
    return panels


def plot_panels(panels: Sequence[Panel], path: Path) -> None:
    """Side by side, with one legend."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.5 + 5.5 * len(panels), 4.3), layout="constrained")
    labels = [label.partition(" ") for panel in panels for label in panel["lines"]]
    colours = {word: f"C{number}" for number, word in enumerate(dict.fromkeys(word for word, _, _ in labels))}
    styles = dict(zip(dict.fromkeys(rest for _, _, rest in labels), cycle(_STYLES), strict=False))
    handles = {}
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for label, (x, y) in panel["lines"].items():
            word, _, rest = label.partition(" ")
            values = [[math.nan if one is None else one for one in column] for column in (x, y)]
            line = {"color": colours[word], "linestyle": styles[rest], "marker": "."}
            (handles[label],) = axes.plot(*values, label=label, **line)
            axes.xaxis.get_major_locator().set_params(integer=all(isinstance(one, int) for one in x))
        axes.set(title=panel["title"], xlabel=panel["x"], ylabel=panel["y"])
        if panel["decades"]:
            axes.set(yscale="log", ylim=panel["decades"])
        axes.grid(alpha=0.3)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper")
    save(figure, path, mark_of_panels(panels))


def mark_of_panels(panels: Sequence[Panel]) -> str:
    """A hash of what they show."""
    return hashlib.sha256(to_json(panels).encode()).hexdigest()


def save(figure: "Figure", path: Path, mark: str) -> None:
    """As its name says, PNG or SVG; it tells in its file what it was drawn of."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80, metadata={_MARK: mark})


def read_mark(path: Path) -> str | None:
    """Of what a picture was drawn of; None: there is no such picture."""
    from PIL import Image  # matplotlib needs it too

    if not path.exists():
        return None
    with Image.open(path) as picture:
        return picture.info.get(_MARK)
