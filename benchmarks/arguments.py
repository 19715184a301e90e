"""What the command lines of benchmarks have in common."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from .experiments import DATASETS
from .provenance import commit


def make_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Of ``python -m benchmarks.NAME``, with its first option, --output."""
    commit()  # asked for now, and not when the figures are there
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, help="write the table as JSON to this file too")
    return parser


def add_data(parser: argparse.ArgumentParser) -> None:
    """The options --data and --datasets of those that run the paper's experiments."""
    parser.add_argument("--data", type=Path, help="folder with cifar10.npz, cifar100.npz; default: torchvision's")
    parser.add_argument("--datasets", default="cifar10", help=f"of {', '.join(DATASETS)} (default: %(default)s)")


def split_names(parser: argparse.ArgumentParser, given: argparse.Namespace, **allowed: Sequence[str]) -> None:
    """Make a list of an option's text, each name once, or end with a message that has what is allowed in it."""
    for key, names in allowed.items():
        text = getattr(given, key)
        setattr(given, key, list(dict.fromkeys(text.split(","))))
        if not set(getattr(given, key)) <= set(names):
            parser.error(f"--{key}={text}; allowed, joined by commas: {', '.join(names)}")


def check_least(parser: argparse.ArgumentParser, given: argparse.Namespace, **least: int) -> None:
    """End with a message if an option's number is smaller than that."""
    for key, number in least.items():
        if getattr(given, key) < number:
            option = f"--{key.replace('_', '-')}"
            parser.error(f"{option}={getattr(given, key)} is not allowed; allowed: >= {number}")


def whole_numbers(text: str) -> list[int]:
    """Those that stand in a text, joined by commas; [0] where it holds anything else, which nothing allows.

    >>> whole_numbers("10,100"), whole_numbers("ten")
    ([10, 100], [0])
    """
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        return [0]
