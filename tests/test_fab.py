"""What travels: the Flower App Bundle and the wheel's contents."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def fab(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built by ``flwr build`` from a copy of the checkout, in a folder of a name that Flower allows."""
    folder = tmp_path_factory.mktemp("build")
    app = folder / "fedpm-flwr"
    shutil.copytree(ROOT, app, ignore=shutil.ignore_patterns(".venv*", ".git", "runs", "*_cache", "__pycache__"))
    flwr = Path(sys.executable).parent / "flwr"
    subprocess.run([flwr, "build", "--app", app], cwd=folder, check=True, env={"FLWR_HOME": str(folder / "home")})
    (file,) = folder.glob("*.fab")
    return zipfile.ZipFile(file)


def test_the_fab_holds_the_application_and_nothing_else(fab: zipfile.ZipFile) -> None:
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fedpm_flwr").rglob("*.py")}
    expected = package | {"client_app.py", "server_app.py", "pyproject.toml", "README.md", "LICENSE"}
    assert {name for name in fab.namelist() if not name.startswith(".info/")} == expected
    assert {name for name in fab.namelist() if name.startswith(".info/")} == {".info/CONTENT"}


def test_the_fab_is_small(fab: zipfile.ZipFile) -> None:
    assert sum(info.compress_size for info in fab.infolist()) < 1_000_000


def test_versions_agree() -> None:
    import fedpm_flwr

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == fedpm_flwr.__version__
    assert "flwr>=1.39,<2" in project["dependencies"]
    assert "flwr[simulation]==1.39.*" in project["optional-dependencies"]["app"]
