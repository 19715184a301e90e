"""What ``pip install fedpm-flwr`` brings: built, looked into, and used without the checkout and without extras."""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import fedpm_flwr

from .installed import NOT_OURS, ROOT, build, install

SOURCES = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fedpm_flwr").rglob("*.py")} | {
    "fedpm_flwr/py.typed"
}
JUNK = (
    "notes.txt",
    "data/train.npz",
    "examples/data/digits/train.parquet",
    "runs/1/model.safetensors",
    "benchmarks/results/mine.jsonl",
    "keys/ca.key",
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist and the wheel of a checkout in which other things lie about."""
    folder = tmp_path_factory.mktemp("package")
    checkout = folder / "checkout"
    shutil.copytree(ROOT, checkout, ignore=NOT_OURS)
    for name in JUNK:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("not for others")
    return build(checkout, folder / "dist")


@pytest.fixture(scope="module")
def python(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(built[1], tmp_path_factory.mktemp("installed"))


def run(python: Path, folder: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, "-c", code, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


def test_the_wheel_holds_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    names = zipfile.ZipFile(built[1]).namelist()
    assert {name for name in names if ".dist-info/" not in name} == SOURCES
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_wheel_asks_for_the_library_s_dependencies_alone(built: tuple[Path, Path]) -> None:
    wheel = zipfile.ZipFile(built[1])
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = email.message_from_bytes(wheel.read(name))
    needed = [text for text in metadata.get_all("Requires-Dist", []) if "extra ==" not in text]
    assert sorted(text.split(">")[0].split("<")[0] for text in needed) == ["flwr", "numpy", "safetensors", "torch"]
    extras = {"app", "dev", "docs", "examples", "tasks", "tensorboard"}
    assert set(metadata.get_all("Provides-Extra", [])) == extras
    assert metadata["Requires-Python"] == ">=3.11"


def test_the_sdist_holds_what_building_and_testing_take(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames()}
    assert names >= SOURCES | {"pyproject.toml", "README.md", "LICENSE", "client_app.py", "tests/conftest.py"}
    assert names >= {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "examples").rglob("*")
        if path.suffix in (".py", ".toml")
    }
    assert names.isdisjoint(JUNK)
    assert not any(name.startswith("benchmarks/results/") for name in names)
    assert built[0].stat().st_size < 2_000_000


def test_an_index_would_take_them(built: tuple[Path, Path]) -> None:
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *built], check=True)


def test_all_uses_run_without_the_extras(python: Path, tmp_path: Path) -> None:
    shutil.copy(ROOT / "tests" / "uses.py", tmp_path)
    done = subprocess.run([python, "uses.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert str(python.parents[1]) in done.stdout.splitlines()[-1]  # the wheel's copy was run


def test_every_module_can_be_imported_without_the_extras(python: Path, tmp_path: Path) -> None:
    files = [name.removesuffix(".py") for name in sorted(SOURCES) if name.endswith(".py")]
    modules = [name.removesuffix("/__init__").replace("/", ".") for name in files if "__main__" not in name]
    done = run(python, tmp_path, "".join(f"import {name}\n" for name in modules))
    assert done.returncode == 0, done.stderr


NEEDS = {
    "tasks.load_dataset('digits')": "sklearn",
    "tasks.load_dataset('breast-cancer')": "sklearn",
    "tasks.load_dataset('libsvm:/a9a')": "sklearn",
    "tasks.load_dataset('cifar10')": "torchvision",
    "tasks.load_dataset('folder:/images')": "torchvision",
    "tasks.build_model('resnet18-gn', (3, 32, 32), 10, 0)": "torchvision",
    "tasks.partition_indices([0, 1] * 50, 2, partition='iid')": "datasets",
    "report.plot_curves({}, None)": "matplotlib",
}
TRY_EACH = """
import json, sys
from fedpm_flwr import report, tasks
said = {}
for code in json.loads(sys.argv[1]):
    try:
        eval(code)
    except ModuleNotFoundError as error:
        said[code] = str(error)
print(json.dumps(said))
"""


def test_what_needs_an_extra_says_so(python: Path, tmp_path: Path) -> None:
    done = run(python, tmp_path, TRY_EACH, json.dumps(list(NEEDS)))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        code: f"{package} is not installed; pip install 'fedpm-flwr[tasks]' brings it"
        for code, package in NEEDS.items()
    }


def test_a_release_is_published_only_after_it_was_checked_and_installed() -> None:
    workflow = yaml.load((ROOT / ".github/workflows/release.yml").read_text(), yaml.BaseLoader)
    assert workflow["on"] == {"push": {"tags": ["v*"]}}
    jobs = workflow["jobs"]
    assert {name: job.get("needs") for name, job in jobs.items()} == {
        "build": None,
        "install": "build",
        "publish": "install",
    }
    assert [name for name, job in jobs.items() if "id-token" in job["permissions"]] == ["publish"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    made = [command.removeprefix("make ") for command in commands if command.startswith("make ")]
    assert made == ["check", "dist"]
    assert set(made) <= set(targets)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    tag = {**os.environ, "PATH": path, "GITHUB_REF_NAME": f"v{fedpm_flwr.__version__}"}
    (same,) = [command for command in commands if "GITHUB_REF_NAME" in command]
    assert subprocess.run(["bash", "-c", same], cwd=ROOT, env=tag, check=False).returncode == 0
    other = tag | {"GITHUB_REF_NAME": "v0.0.9"}
    assert subprocess.run(["bash", "-c", same], cwd=ROOT, env=other, check=False).returncode == 1
