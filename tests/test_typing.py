"""The types that users' checkers and editors see: those of the wheel, in an environment that holds it."""

import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_type_hints

import pytest

from fedpm_flwr.optim import SecondOrder
from fedpm_flwr.optim.shared import SharedWithDecay

from .installed import ROOT, build, install


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("typing")
    _, wheel = build(ROOT, folder / "dist")
    return install(wheel, folder / "environment")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder away from the checkout with the uses alone."""
    shutil.copy(ROOT / "tests" / "uses.py", tmp_path)
    return tmp_path


Mypy = Callable[[str], subprocess.CompletedProcess[str]]


@pytest.fixture
def mypy(python: Path, project: Path, request: pytest.FixtureRequest) -> Mypy:
    """Checks a file of the project; what it knows of PyTorch is kept, since that takes most of its time."""
    cache = request.config.cache
    assert cache is not None
    options = ["--strict", "--untyped-calls-exclude=torch", "--config-file=", "--python-executable", str(python)]
    command = [sys.executable, "-m", "mypy", *options, "--cache-dir", str(cache.mkdir("mypy"))]
    return lambda name: subprocess.run([*command, name], cwd=project, capture_output=True, text=True, check=False)


def test_mypy_strict_accepts_all_uses(mypy: Mypy) -> None:
    done = mypy("uses.py")
    assert done.returncode == 0, done.stdout + done.stderr


def test_mypy_finds_a_misspelt_argument(mypy: Mypy, project: Path) -> None:
    optimizers = ("FOOF", "KFAC", "LTDA", "Newton", "Sophia")
    lines = [f"{name}(nn.Linear(1, 1), momentun=0.9)" for name in optimizers]
    head = f"from torch import nn\nfrom fedpm_flwr.optim import {', '.join(optimizers)}\n"
    (project / "misspelt.py").write_text(head + "\n".join(lines))
    told = mypy("misspelt.py").stdout
    for name in optimizers:
        assert f'Unexpected keyword argument "momentun" for "{name}"' in told


def test_the_types_know_every_argument_that_optimizers_share() -> None:
    own = {"lr", "damping", "ema", "refresh_interval", "inverse_interval"}  # each has its own default of these
    parameters = inspect.signature(SecondOrder).parameters.values()
    shared = {one.name for one in parameters if one.kind is one.KEYWORD_ONLY} - own
    assert set(get_type_hints(SharedWithDecay)) == shared


def pyright(python: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """As an editor of somebody who has activated this environment."""
    path = os.pathsep.join([str(python.parent), os.environ["PATH"]])
    command = [sys.executable, "-m", "pyright", *arguments]
    environment = {**os.environ, "PATH": path}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_pyright_accepts_all_uses(python: Path, project: Path) -> None:
    done = pyright(python, project, "uses.py")
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_public_name_has_an_unknown_type(python: Path, project: Path) -> None:
    done = pyright(python, project, "--outputjson", "--ignoreexternal", "--verifytypes", "fedpm_flwr")
    told = json.loads(done.stdout)["typeCompleteness"]
    assert Path(told["pyTypedPath"]).is_relative_to(python.parents[1])
    unknown = [
        f"{symbol['name']}: {problem['message']}"
        for symbol in told["symbols"]
        if symbol["isExported"] and not symbol["isTypeKnown"] and not symbol["isTypeAmbiguous"]
        for problem in symbol["diagnostics"]
    ]
    assert unknown == []
