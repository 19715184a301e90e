"""The files of docker/ as Docker Compose reads them: merged, with variables put in."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

DOCKER = Path(__file__).resolve().parent.parent / "docker"
_VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?P<how>:[-?])(?P<word>[^}]*)\}")


@dataclass(frozen=True)
class Service:
    """One container: its command, and which files and folders it sees where."""

    name: str
    command: list[str]
    image: str
    mounts: dict[str, str]
    """What, by where in the container: a path of the host, or the name of a volume."""
    read_only: set[str]
    made_if_missing: set[str]
    """What Docker would make, as an empty folder of root's, if it were not there."""
    ports: list[str]
    after: dict[str, str]
    """The services that are to be there first, and how: ``service_started`` or ``service_healthy``."""
    settings: dict[str, Any] = field(default_factory=dict)

    def option(self, flag: str) -> str | None:
        """The value of ``--flag=value`` in the command."""
        return next((word.partition("=")[2] for word in self.command if word.partition("=")[0] == flag), None)

    @property
    def flags(self) -> set[str]:
        return {word.partition("=")[0] for word in self.command[1:]}


def services(files: Sequence[str], variables: Mapping[str, str]) -> dict[str, Service]:
    """The services of some files, the later of which are overlays of the first."""
    merged: dict[str, Any] = {}
    for file in files:
        merged = _merge(merged, yaml.safe_load((DOCKER / file).read_text()))
    merged = _filled_in(merged, variables)
    declared = set(merged.get("volumes") or ())
    return {name: _service(name, content, declared) for name, content in merged["services"].items()}


def _service(name: str, content: dict[str, Any], declared: set[str]) -> Service:
    mounts, read_only, made_if_missing = {}, set(), set()
    for volume in map(_long, content.get("volumes", ())):
        source, target = volume["source"], volume["target"]
        assert volume["type"] == ("bind" if source.startswith("/") else "volume"), f"{name}: {source}"
        assert source.startswith("/") or source in declared, f"{name}: no volume {source}"
        assert target not in mounts, f"{name}: two mounts at {target}"
        mounts[target] = source
        if volume.get("read_only", False):
            read_only.add(target)
        if volume["type"] == "bind" and volume.get("bind", {}).get("create_host_path", True):
            made_if_missing.add(source)
    return Service(
        name=name,
        command=content["command"],
        image=content["image"],
        mounts=mounts,
        read_only=read_only,
        made_if_missing=made_if_missing,
        ports=[str(port) for port in content.get("ports", ())],
        after={other: how["condition"] for other, how in content.get("depends_on", {}).items()},
        settings=content,
    )


def _long(volume: str | dict[str, Any]) -> dict[str, Any]:
    """A volume in the long syntax, whichever it is in."""
    if isinstance(volume, dict):
        assert volume.keys() <= {"type", "source", "target", "read_only", "bind"}
        return volume
    source, target, *mode = volume.split(":")
    assert mode in ([], ["ro"], ["rw"])
    kind = "bind" if source.startswith("/") else "volume"
    return {"type": kind, "source": source, "target": target, "read_only": mode == ["ro"]}


def _merge(base: Any, overlay: Any, key: str = "") -> Any:
    """As Compose does: mappings by key, lists one after the other, but a command as a whole."""
    if isinstance(base, dict) and isinstance(overlay, dict):
        return base | {name: _merge(base.get(name), value, name) for name, value in overlay.items()}
    if isinstance(base, list) and isinstance(overlay, list) and key != "command":
        return base + overlay
    return base if overlay is None else overlay


def _filled_in(value: Any, variables: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _filled_in(one, variables) for key, one in value.items()}
    if isinstance(value, list):
        return [_filled_in(one, variables) for one in value]
    return _VARIABLE.sub(lambda found: _lookup(found, variables), value) if isinstance(value, str) else value


def _lookup(found: re.Match[str], variables: Mapping[str, str]) -> str:
    given = variables.get(found["name"])
    if given:
        return given
    if found["how"] == ":?":
        raise KeyError(f"{found['name']}: {found['word']}")
    return found["word"]
