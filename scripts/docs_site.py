"""Files of the repository as parts of the site, links that work in both, and the table of settings.

mkdocs calls this (``hooks`` in mkdocs.yml), where neither PyTorch nor Flower need be.
"""

import html
import os
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fedpm_flwr.config import settings_table  # noqa: E402  # only found by the line above

DOCS = "docs/"
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
"""Files of the repository's root, and the pages they are in the site."""
SETTINGS = "<!-- settings -->"
_LINK = re.compile(r"(?<=\]\()([^)\s:#]+)(?=[)#])")
_FILES = "repository/"
"""Where in the site other files of the repository are."""


def on_files(files: Files, config: Any) -> None:
    for path, place in PAGES.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links are written as between files of the repository; in the site some of these lie elsewhere."""
    place = page.file.src_uri
    path = next((path for path, other in PAGES.items() if other == place), DOCS + place)

    def linked(link: re.Match[str]) -> str:
        target = os.path.normpath(os.path.join(os.path.dirname(path), link[1]))
        return os.path.relpath(_in_site(target, config, files), os.path.dirname(place) or ".")

    return _LINK.sub(linked, markdown.replace(SETTINGS, _settings()))


def _in_site(path: str, config: Any, files: Files) -> str:
    """Where a file of the repository is in the site. What is no page goes there as text, a folder as a list."""
    if path in PAGES or path.startswith(DOCS) or not (ROOT / path).exists():
        return PAGES.get(path, path.removeprefix(DOCS))
    is_folder = (ROOT / path).is_dir()
    place = f"{_FILES}{path}.{'html' if is_folder else 'txt'}"
    if files.get_file_from_path(place) is None:
        content = {"content": _listing(path, config, files)} if is_folder else {"abs_src_path": str(ROOT / path)}
        files.append(File.generated(config, place, **content))
    return place


def _listing(path: str, config: Any, files: Files) -> str:
    """The files in a folder as a page in HTML, each with a link to it."""
    names = sorted(entry.name for entry in (ROOT / path).iterdir() if entry.is_file())
    places = (_in_site(f"{path}/{name}", config, files) for name in names)
    links = (os.path.relpath(place, os.path.dirname(_FILES + path)) for place in places)
    lines = "".join(f'<li><a href="{link}">{name}</a></li>' for name, link in zip(names, links, strict=True))
    return f"<!doctype html><meta charset=utf-8><title>{path}</title><h1>{path}</h1><ul>{lines}</ul>"


def _settings() -> str:
    """A table in Markdown."""
    rows = (
        f"`{key}` | `{default}` | {html.escape(allowed, quote=False)} | {html.escape(meaning, quote=False)}"
        for key, default, allowed, meaning in (
            [cell.replace("|", "\\|") for cell in row] for row in settings_table()
        )
    )
    head = ("setting | default | allowed | meaning", "--- | --- | --- | ---")
    return "\n".join(f"| {row} |" for row in (*head, *rows))
