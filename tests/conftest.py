"""Settings of the whole suite."""

import os
from collections.abc import Generator

import pytest
import torch
from hypothesis import settings

# Times vary on shared machines; nothing here tests speed.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")

# A page of a user's: importing it adds a kind of curvature.
collect_ignore = ["uses.py"]

# Tests compute little, many times over: a second thread costs more than it brings.
torch.set_num_threads(1)

_LONGEST = ("tests/test_simulation.py", "tests/test_vision_benchmark.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: each goes to one worker whole, and what is left at the end has the others idle."""
    items.sort(key=lambda item: not item.nodeid.startswith(_LONGEST))


@pytest.hookimpl(wrapper=True)
def pytest_xdist_auto_num_workers() -> Generator[None, int, int]:
    """One more than cores, if nothing else is asked for: much of a test of Flower's processes is waiting."""
    cores = yield
    return cores if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ else cores + 1
