"""The documentation: every page has its place, every link leads somewhere, every public name is explained."""

import ast
import importlib
import inspect
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from .installed import ROOT

PAGES = [
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
]
API = {path.stem for path in (ROOT / "docs" / "api").glob("*.md")}
LINK = re.compile(r"\]\(([^)\s]*)\)")
"""As ``scripts.docs_site`` finds them too."""


FENCED = re.compile(r"^```.*?^```", flags=re.MULTILINE | re.DOTALL)


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", FENCED.sub("", text))


def anchors(page: Path) -> set[str]:
    """Of the page's headings, as the file browsers of repositories make them, and the site by its ``slugify``."""
    headings = re.findall(r"^#+ (.+?)\s*$", FENCED.sub("", page.read_text()), flags=re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


def is_broken(page: Path, link: str) -> bool:
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    if not target.is_relative_to(ROOT) or not target.exists():
        return True
    return bool(anchor) and (target.suffix != ".md" or anchor not in anchors(target))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link in LINK.findall(without_code(page.read_text())) if "://" not in link]
    assert [link for link in links if is_broken(page, link)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_lists_are_the_same_in_the_site_and_in_file_browsers(page: Path) -> None:
    """Their paragraphs are indented by four, and an item after such a paragraph has an empty line before it."""
    text = FENCED.sub("", page.read_text())
    assert re.findall(r"\n\n((?: {1,3}| {5,7})\S.*)", text) == []
    assert re.findall(r"\n\n(?: {4}\S.*\n)+((?:-|\d+\.) .*)", text) == []


@pytest.mark.parametrize(
    ("link", "broken"),
    [
        ("curvature.md#layers", False),
        ("../fedpm_flwr/config.py", False),
        ("curvature.md#nothing", True),
        ("nothing.md", True),
        ("../../elsewhere.md", True),
        ("#the-algorithm", False),
        ("#nothing", True),
    ],
)
def test_a_broken_link_is_found(link: str, broken: bool) -> None:
    assert is_broken(ROOT / "docs" / "algorithm.md", link) is broken


SITE = yaml.load((ROOT / "mkdocs.yml").read_text(), yaml.BaseLoader)


def places(nav: Any) -> Iterator[str]:
    """The pages of a part of the nav."""
    if isinstance(nav, str):
        yield nav
    else:
        for part in nav if isinstance(nav, list) else nav.values():
            yield from places(part)


def test_every_page_is_in_the_nav_once() -> None:
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    expected = {*pages, "index.md", "CONTRIBUTING.md", "CHANGELOG.md"}
    assert sorted(places(SITE["nav"])) == sorted(expected)


def constants(module: Any) -> dict[str, bool]:
    """The public constants of a module's own file, or of a package's files: whether text stands below them."""
    file = Path(module.__file__)
    found: dict[str, bool] = {}
    for path in file.parent.glob("*.py") if file.name == "__init__.py" else [file]:
        body = ast.parse(path.read_text()).body
        for node, after in zip(body, [*body[1:], None], strict=True):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            found |= {name.id: said for name in targets if isinstance(name, ast.Name) and name.id[0] != "_"}
    return found


def unexplained(module: Any) -> Iterator[str]:
    said = constants(module)
    for name, thing in vars(module).items():
        exported = getattr(module, "__all__", None)
        if name not in exported if exported is not None else name[0] == "_":
            continue
        if not (inspect.isclass(thing) or inspect.isfunction(thing)):
            if said.get(name) is False:
                yield name
        elif exported is not None or thing.__module__ == module.__name__:
            parts = {key: part for key, part in vars(thing).items() if inspect.isclass(thing) and key[0] != "_"}
            if not thing.__doc__:
                yield name
            for key, part in parts.items():
                is_method = inspect.isfunction(part) or isinstance(part, property | classmethod | staticmethod)
                if is_method and not inspect.getdoc(getattr(thing, key)):
                    yield f"{name}.{key}"


@pytest.mark.parametrize("name", sorted(API))
def test_every_public_name_is_explained(name: str) -> None:
    module = importlib.import_module(f"fedpm_flwr.{name}")
    assert f"::: fedpm_flwr.{name}\n" in (ROOT / "docs" / "api" / f"{name}.md").read_text()
    assert list(unexplained(module)) == []


@pytest.mark.skipif(
    shutil.which("mkdocs") is None, reason="needs `pip install 'fedpm-flwr[docs]'`; make docs has it"
)
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """``strict`` in mkdocs.yml makes a warning an error, unless --quiet keeps it from being counted."""
    subprocess.run(["mkdocs", "build", "--site-dir", tmp_path], cwd=ROOT, check=True)
