"""Every message that we raise or log is in docs/troubleshooting.md, and nothing else is."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACES = ("fedpm_flwr/**", "scripts", "benchmarks", ".")
SOURCES = [path for place in PLACES for path in sorted(ROOT.glob(f"{place}/*.py"))]
LOGGED = ("warning", "error", "warn")
_FEW_LETTERS = 7


def template(node: ast.expr) -> str | None:
    """A message with … for each value in it, but without the round that it may begin with."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        text = node.value
    elif isinstance(node, ast.JoinedStr):
        text = "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    else:
        return None
    if isinstance(node, ast.Constant):
        text = re.sub(r"%[a-z]", "…", re.sub(r"^%s(round %d: |%s(?=[a-z]))?", "", text))
    return text.split("\n")[0]


def messages() -> Iterator[str]:
    """What is raised or logged."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            expression = None
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                expression = node.exc.args[0]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOGGED:
                expression = node.args[0]
            text = template(expression) if expression is not None else None
            if text and len(re.findall(r"\w", text)) >= _FEW_LETTERS:
                yield text


def strings() -> Iterator[str]:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            text = template(node) if isinstance(node, ast.expr) else None
            if text:
                yield text


def documented() -> list[str]:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    return re.findall(r"^\| `(.+?)` \|", text, flags=re.MULTILINE)


def pattern(line: str) -> re.Pattern[str]:
    return re.compile(re.escape(line).replace("…", ".*"))


def test_every_message_is_documented() -> None:
    known = [pattern(line) for line in documented()]
    assert [text for text in messages() if not any(line.fullmatch(text) for line in known)] == []


def test_every_documented_message_exists() -> None:
    said = set(strings())
    assert [line for line in documented() if not any(pattern(line).fullmatch(text) for text in said)] == []
