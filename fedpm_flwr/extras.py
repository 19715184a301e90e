"""Packages that the library does without, and some of its functions do not."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around imports: what is missing is told with the extra of fedpm-flwr that brings it.

    Raises:
        ModuleNotFoundError: a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is not installed; pip install 'fedpm-flwr[{extra}]' brings it", name=error.name
        ) from error
