"""The floors of the house: a module imports only from floors below its own, or from its own package."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    "client_app": 10,
    "server_app": 10,
    "fedpm_flwr.algorithms": 9,
    "fedpm_flwr.inline": 9,
    "fedpm_flwr.server_optimizers": 9,
    "fedpm_flwr.rivals": 8,
    "fedpm_flwr.method": 7,
    "fedpm_flwr.corrected": 8,
    "fedpm_flwr.strategy": 8,
    "fedpm_flwr.control_variates": 7,
    "fedpm_flwr.reproducible": 7,
    "fedpm_flwr.guarded": 6,
    "fedpm_flwr.checkpointed": 8,
    "fedpm_flwr.packing": 6,
    "fedpm_flwr.agreement": 1,
    "fedpm_flwr.recorder": 6,
    "fedpm_flwr.grids": 5,
    "fedpm_flwr.replies": 5,
    "fedpm_flwr.rewriting": 5,
    "fedpm_flwr.events": 4,
    "fedpm_flwr.messages": 4,
    "fedpm_flwr.checkpoint": 4,
    "fedpm_flwr.objective": 4,
    "fedpm_flwr.training": 3,
    "fedpm_flwr.optimizers": 3,
    "fedpm_flwr.state": 3,
    "fedpm_flwr.tasks": 3,
    "fedpm_flwr.report": 3,
    "fedpm_flwr.durable": 2,
    "fedpm_flwr.optim": 2,
    "fedpm_flwr.estimators": 1,
    "fedpm_flwr.wire": 1,
    "fedpm_flwr.mixing": 1,
    "fedpm_flwr.curvature": 0,
    "fedpm_flwr.privacy": 0,
    "fedpm_flwr.extras": 0,
    "fedpm_flwr.config": 0,
    "fedpm_flwr": 0,
}
FLOWER_FROM = 4
"""The lowest floor that imports flwr; below it the library runs where Flower is not installed."""


def place(module: str) -> str:
    """The entry of FLOORS that a module belongs to: itself or the package it is in."""
    package = ".".join(module.split(".")[:2])
    if package not in FLOORS:
        raise AssertionError(f"{module} stands on no floor: add it to FLOORS")
    return package


def modules() -> Iterator[tuple[str, Path]]:
    for path in [*sorted((ROOT / "fedpm_flwr").rglob("*.py")), ROOT / "client_app.py", ROOT / "server_app.py"]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(module: str, path: Path) -> Iterator[str]:
    """Absolute names of all that a file imports, wherever in it."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                submodule = ROOT.joinpath(*source.split("."), alias.name)
                is_module = submodule.is_dir() or submodule.with_suffix(".py").exists()
                yield f"{source}.{alias.name}" if is_module else source


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=[name for name, _ in modules()])
def test_imports_only_from_below(module: str, path: Path) -> None:
    own = place(module)
    for imported in imports(module, path):
        top = imported.split(".")[0]
        if top in ("fedpm_flwr", "client_app", "server_app"):
            other = place(imported)
            assert other == own or FLOORS[other] < FLOORS[own], f"{module} imports {imported}"
        if top == "flwr":
            assert FLOORS[own] >= FLOWER_FROM, f"{module} imports {imported}"


def test_every_floor_is_inhabited() -> None:
    assert {place(module) for module, _ in modules()} == set(FLOORS)


def test_the_lower_floors_work_without_flower() -> None:
    lower = [name for name, floor in FLOORS.items() if floor < FLOWER_FROM and name != "fedpm_flwr.tasks"]
    code = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in ("flwr", "ray", "matplotlib"))
    code += "".join(f"import {name}\n" for name in lower)
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_two_root_files_are_wiring() -> None:
    for name in ("client_app.py", "server_app.py"):
        assert len((ROOT / name).read_text().splitlines()) < 100
