"""The apps in examples/: what differs between before and after, and that both train through Flower."""

import difflib
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from flwr.cli.build import build_fab_from_disk

from .installed import ROOT

EXAMPLES = ROOT / "examples"
NEEDS = {
    "pytorch": ("flwr_datasets", "torchvision"),
    "lightning": ("lightning",),
    "lora": ("peft", "transformers"),
}
APPS = [(name, state) for name in NEEDS for state in ("before", "after")]

README_LINES = (
    r"from fedpm_flwr\.strategy import FedPM",
    r"    strategy = FedPM\(fraction_train=1\.0\)",
    r"from fedpm_flwr\.messages import curvature_record",
    r"from fedpm_flwr\.optim import FOOF",
    r" +(optimizer =|return) FOOF\((model|net|self), .*\)",
    r' +"curvature": curvature_record\(.*, msg\),',
)
"""Of "Use it in your own Flower project"."""
RETURNS_ITS_OPTIMIZER = (
    r"    train_loss, optimizer = train_fn\(.*\)",
    r"    return total / \(epochs \* len\(trainloader\)\), optimizer",
)
"""Of docs/adopt.md, for a training function that makes the optimizer."""


def difference(name: str, *files: Path) -> tuple[list[str], list[str]]:
    """The lines that are in the one app only, and those that are in the other only."""
    old, new = list[str](), list[str]()
    for file in files:
        before, after = (
            (EXAMPLES / name / state / file).read_text().splitlines() for state in ("before", "after")
        )
        for line in difflib.ndiff(before, after):
            if line.startswith(("- ", "+ ")):
                (old if line[0] == "-" else new).append(line[2:])
    return old, new


def files_of(name: str, state: str) -> list[Path]:
    folder = EXAMPLES / name / state
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.suffix in (".py", ".toml"))


@pytest.mark.parametrize("name", NEEDS)
def test_the_documented_lines_are_all_that_differs(name: str) -> None:
    files = files_of(name, "before")
    assert files == files_of(name, "after")
    assert difference(name, Path("pyproject.toml")) == ([], ['    "fedpm-flwr>=0.1,<2",'])
    old, new = difference(name, *(file for file in files if file.suffix == ".py"))
    documented = README_LINES + (RETURNS_ITS_OPTIMIZER if name == "pytorch" else ())
    assert [sum(bool(re.fullmatch(line, found)) for found in new) for line in documented] == [1] * len(documented)
    assert len(new) == len(documented)
    assert len(old) == len(new) - 3  # two imports more, and the record


@pytest.mark.parametrize(("name", "state"), APPS)
def test_flower_builds_it(name: str, state: str) -> None:
    assert build_fab_from_disk(EXAMPLES / name / state)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    subprocess.run([sys.executable, EXAMPLES / "make_data.py", folder], check=True, capture_output=True)
    return folder


def replies_of(name: str, state: str, data: Path, folder: Path) -> list[dict[str, Any]]:
    """Two rounds of three clients, in a process of its own, since all apps of a name have the same modules."""
    path = data / ("python.txt" if name == "lora" else "digits")
    config = json.dumps({"data-path": str(path), "num-server-rounds": 2})
    command = [sys.executable, str(ROOT / "tests" / "run_app.py"), str(EXAMPLES / name / state), config]
    offline = {"HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **offline}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "left out the reply" not in done.stderr + done.stdout
    replies: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return replies


def mean_loss(replies: list[dict[str, Any]]) -> float:
    weights = [reply["metrics"]["num-examples"] for reply in replies]
    losses = [reply["metrics"]["eval_loss"] for reply in replies]
    return float(sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights))


@pytest.mark.parametrize(("name", "state"), APPS)
def test_it_trains_and_sends_curvature_of_all_that_it_exchanges(
    name: str, state: str, data: Path, tmp_path: Path
) -> None:
    missing = [module for module in NEEDS[name] if find_spec(module) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed; make test-examples installs it")
    replies = replies_of(name, state, data, tmp_path)
    assert len(replies) == 2 * (3 + 3)  # three train and three evaluate in each round
    trained, evaluated = ([r for r in replies if bool(r["arrays"]) == trains] for trains in (True, False))
    for reply in trained:
        assert reply["curvature"] == (reply["arrays"] if state == "after" else [])
    if name == "lora":
        assert all(re.search(r"\.lora_[AB]\.weight$|\.lm_head\.weight$", key) for key in trained[0]["arrays"])
    assert mean_loss(evaluated[3:]) < mean_loss(evaluated[:3])
