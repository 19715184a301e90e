"""The types that users' checkers and editors see: those of the wheel, in an environment that holds it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_mypy_strict_accepts_all_uses(python: Path, project: Path, request: pytest.FixtureRequest) -> None:
    cache = request.config.cache
    assert cache is not None
    options = ["--strict", "--untyped-calls-exclude=torch", "--config-file=", "--python-executable", str(python)]
    command = [sys.executable, "-m", "mypy", *options, "--cache-dir", str(cache.mkdir("mypy")), "uses.py"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


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
