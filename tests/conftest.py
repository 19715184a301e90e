"""Settings of the whole suite."""

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first: each goes to one core whole, and what is left at the end has the other one idle."""
    items.sort(key=lambda item: not item.nodeid.startswith("tests/test_simulation.py"))
