"""Importing the library brings in nothing heavy and changes nothing: checked in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .installed import ROOT

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "fedpm_flwr").rglob("*.py")
    if path.name != "__main__.py"
)


@pytest.fixture(scope="module")
def effects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of importing every module of the library after Flower and PyTorch."""
    folder = tmp_path_factory.mktemp("imports")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-B",
        str(ROOT / "tests" / "effects.py"),
        *MODULES,
    ]  # -B: no .pyc files of Python's own
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert list(Path(folder).iterdir()) == []
    told: dict[str, Any] = json.loads(done.stdout)  # and so nothing else was printed
    return told


def test_only_safetensors_is_loaded_beside_the_standard_library(effects: dict[str, Any]) -> None:
    """So none of torch._dynamo, matplotlib, scikit-learn, Ray, torchvision, flwr-datasets, nor more of Flower."""
    others = {name for name in effects["new"] if name.split(".")[0] not in sys.stdlib_module_names}
    own = {name for name in others if name.split(".")[0] == "fedpm_flwr"}
    assert own == set(MODULES)
    assert [name for name in sorted(others - own) if name.split(".")[0] != "safetensors"] == []


def test_nothing_is_written_started_or_asked_for(effects: dict[str, Any]) -> None:
    assert effects["done"] == []


def test_nothing_of_the_process_changes(effects: dict[str, Any]) -> None:
    assert effects["changed"] == {}
