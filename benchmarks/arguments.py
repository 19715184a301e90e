"""What the command lines of benchmarks have in common."""

import argparse
from pathlib import Path


def make_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Of ``python -m benchmarks.NAME``, with its first option, --output."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, help="write the table as JSON to this file too")
    return parser


def whole_numbers(text: str) -> list[int]:
    """Those that stand in a text, joined by commas; [0] where it holds anything else, which nothing allows.

    >>> whole_numbers("10,100"), whole_numbers("ten")
    ([10, 100], [0])
    """
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        return [0]
