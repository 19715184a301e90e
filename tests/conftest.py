"""Settings of the whole suite."""

import os

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
    """The longest files first: each goes to one core whole, and what is left at the end has the others idle."""
    items.sort(key=lambda item: not item.nodeid.startswith(_LONGEST))


def pytest_xdist_auto_num_workers() -> int:
    """One more than cores: processes of Flower's wait for each other, and leave a quarter of them idle."""
    return (os.cpu_count() or 1) + 1
