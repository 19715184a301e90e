"""The picture beside a benchmark's table: lines in panels, as its JSON keeps them under ``curves``."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypedDict

from .table import to_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARK = "Source"
_STYLES = ("-", "--", ":", "-.")


class Line(NamedTuple):
    """As a pair of lists in JSON; None where there is no finite number."""

    x: Sequence[float | None]
    y: Sequence[float | None]


class Panel(TypedDict):
    """Lines by label: those whose labels begin with the same word have one colour, and a style each."""

    title: str
    x: str
    y: str
    decades: Sequence[float] | None
    """The ends of a logarithmic axis y; None: it is linear, and ends where the lines do."""
    lines: Mapping[str, Line]


def plot_panels(panels: Sequence[Panel], path: Path) -> None:
    """Side by side, with one legend."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.5 + 5.5 * len(panels), 4.3), layout="constrained")
    words = dict.fromkeys(label.split()[0] for panel in panels for label in panel["lines"])
    colours = {word: f"C{number}" for number, word in enumerate(words)}
    handles = {}
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        styles = {word: cycle(_STYLES) for word in words}
        for label, (x, y) in panel["lines"].items():
            word = label.split()[0]
            values = [[math.nan if one is None else one for one in column] for column in (x, y)]
            line = {"color": colours[word], "linestyle": next(styles[word]), "marker": "."}
            (handles[label],) = axes.plot(*values, label=label, **line)
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
    """As a PNG that tells in its file what it was drawn of."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80, metadata={_MARK: mark})


def read_mark(path: Path) -> str | None:
    """Of what a picture was drawn of; None: there is no such picture."""
    from PIL import Image  # matplotlib needs it too

    if not path.exists():
        return None
    with Image.open(path) as picture:
        return picture.info.get(_MARK)
