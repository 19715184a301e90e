"""The Flower App Bundle: what it holds, that it runs where it is installed, that Flower Hub would take it."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk
from safetensors.torch import load_file

from scripts.application import copy_application

from .installed import NOT_OURS, ROOT

FLWR = Path(sys.executable).parent / "flwr"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, in a folder of a name that Flower allows."""
    app = tmp_path_factory.mktemp("build") / "fedpm-flwr"
    shutil.copytree(ROOT, app, ignore=NOT_OURS)
    return app


@pytest.fixture(scope="module")
def fab(checkout: Path) -> Path:
    """Built by ``flwr build``."""
    folder = checkout.parent
    subprocess.run([FLWR, "build", "--app", checkout], cwd=folder, check=True, env={"FLWR_HOME": str(folder)})
    (file,) = folder.glob("*.fab")
    return file


def test_the_fab_holds_the_application_and_nothing_else(fab: Path) -> None:
    names = zipfile.ZipFile(fab).namelist()
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fedpm_flwr").rglob("*.py")}
    expected = package | {"client_app.py", "server_app.py", "pyproject.toml", "README.md", "LICENSE"}
    assert {name for name in names if not name.startswith(".info/")} == expected
    assert {name for name in names if name.startswith(".info/")} == {".info/CONTENT"}


def test_of_a_copy_of_the_application_it_is_the_same(fab: Path, checkout: Path, tmp_path: Path) -> None:
    """Of a checkout in which more lies about than Flower bundles."""
    littered = shutil.copytree(checkout, tmp_path / "littered")
    (littered / "fedpm_flwr" / "notes.txt").write_text("not Python")
    (littered / "fedpm_flwr" / "build").mkdir()
    (littered / "fedpm_flwr" / "build" / "ignored.py").write_text("NOT = 'tracked'")
    (littered / "fedpm_flwr" / "link.py").symlink_to(littered / "client_app.py")
    (littered / "fedpm_flwr" / ".#mixing.py").symlink_to("nobody@nowhere")  # as an editor leaves
    copy = copy_application(tmp_path / "fedpm-flwr", checkout=littered)
    assert not (copy / "fedpm_flwr" / "notes.txt").exists()
    assert build_fab_from_disk(copy) == build_fab_from_disk(littered) == fab.read_bytes()
    copy_application(tmp_path / "other", {"fedpm_flwr/more.py": "TEN = 10"}, checkout)
    assert (tmp_path / "other" / "fedpm_flwr" / "more.py").read_text() == "TEN = 10"


def test_of_the_checkout_itself_it_is_the_same(fab: Path) -> None:
    """With the environment and all else that lies there."""
    assert build_fab_from_disk(ROOT) == fab.read_bytes()


@pytest.mark.parametrize("pattern", ["*.py", "/fedpm_flwr/", "!/client_app.py"])
def test_what_cannot_be_copied_is_named(pattern: str, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(f"[tool.flwr.app]\nfab-include = ['{pattern}']")
    with pytest.raises(ValueError, match=r"pyproject\.toml: fab-include has '.*'; allowed: patterns of files"):
        copy_application(tmp_path / "copy", checkout=tmp_path)


def test_the_fab_is_small(fab: Path) -> None:
    assert fab.stat().st_size < 1_000_000


RUN = """
import sys, tomllib
from pathlib import Path
from flwr.supercore.object_ref import load_app

app = Path(sys.argv[1])
settings = tomllib.loads((app / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
server, client = (load_app(settings["components"][name], ImportError, app) for name in ("serverapp", "clientapp"))

import fedpm_flwr
from fedpm_flwr.inline import run_inline

assert Path(fedpm_flwr.__file__).is_relative_to(app), fedpm_flwr.__file__
changes = {"output": sys.argv[2], "num-server-rounds": 2, "min-available-nodes": 3, "alpha": 10.0}
run_inline(server, client, 3, settings["config"] | changes)
"""


def test_the_fab_runs_where_flower_installs_it(fab: Path, tmp_path: Path) -> None:
    """By the bundle's own settings and code, found as Flower finds them, from a folder that is neither's."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["FLWR_HOME"] = str(tmp_path / "home")
    subprocess.run([FLWR, "install", fab], cwd=tmp_path, check=True, env=environment)
    (app,) = (tmp_path / "home" / "apps").iterdir()
    command = [sys.executable, "-c", RUN, str(app), str(tmp_path / "run")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert [row["clients"] for row in rows] == [0, 3, 3]
    assert rows[2]["test-loss"] < rows[0]["test-loss"]
    model = load_file(tmp_path / "run" / "model.safetensors")
    assert rows[1]["uplink-bytes"] > 1.05 * 3 * sum(value.nbytes for value in model.values())  # curvature travels


def test_flower_hub_would_take_the_checkout(checkout: Path) -> None:
    """By the checks that ``flwr app publish`` makes before it sends: names, sizes, text alone."""
    publish = importlib.import_module("flwr.cli.app_cmd.publish")  # its package has a function of that name
    publish._validate_app_name(checkout.name, "the folder")
    publish._validate_description(PROJECT["project"]["description"])
    files = publish._collect_file_paths(checkout)
    publish._validate_files(files)
    assert checkout / "LICENSE" in files


def test_a_run_s_environment_gets_what_the_application_imports() -> None:
    """Flower installs by ``uv sync``, which takes the default groups, and no extra."""
    groups = PROJECT["tool"]["uv"]["default-groups"]
    assert [line for group in groups for line in PROJECT["dependency-groups"][group]] == ["fedpm-flwr[tasks]"]


def test_versions_agree() -> None:
    import fedpm_flwr

    project = PROJECT["project"]
    assert project["version"] == fedpm_flwr.__version__
    assert "flwr>=1.39,<2" in project["dependencies"]
    assert "flwr[simulation]==1.39.*" in project["optional-dependencies"]["app"]
