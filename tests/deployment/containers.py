"""The services of docker/ as processes of this machine: their own commands, each at an address of its own."""

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from scripts.processes import environment, start, stop_all, wait_until
from tests.compose import DOCKER, Service

_NETWORKS = itertools.count(os.getpid() % 200 + 20)
_CONTAINER_PATH = re.compile(r"(?<![\w./])/(?=(keys|data|state|output)\b)")


class Containers:
    """What ``docker compose up`` would start, in its order; when it is left, all of it is ended.

    A service's name stands for an address 127.N.0.M, and a service sees only the files that are mounted into it.
    """

    def __init__(self, folder: Path, services: Mapping[str, Service]) -> None:
        self.folder, self._services, self._network = folder, services, f"127.{next(_NETWORKS)}.0"
        self.home = folder / "flwr-home"
        self.variables = environment(self.home, 1, 1)
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Containers":
        self.home.mkdir(parents=True)
        for service in self._services.values():
            self._mount(service)
        return self

    def __exit__(self, *_: object) -> None:
        stop_all(self.home)
        for process in self._processes:
            process.wait()

    def address_of(self, service: str) -> str:
        return f"{self._network}.{list(self._services).index(service) + 1}"

    def root_of(self, service: str) -> Path:
        return self.folder / service

    def log_of(self, service: str) -> Path:
        return self.folder / f"{service}.log"

    def start_in_order(self, *programs: str) -> None:
        """Start the services of these commands (none: of all), each after those that it waits for."""
        waiting = [one for one in self._services.values() if not programs or one.command[0] in programs]
        names, started = {one.name for one in waiting}, set[str]()
        while waiting:
            service = next(one for one in waiting if one.after & names <= started)
            waiting.remove(service)
            self.start(service.name)
            started.add(service.name)

    def start(self, name: str) -> None:
        """Start a service and wait until it is healthy."""
        command = [self._translated(self._services[name], word) for word in self._services[name].command]
        process = start(command, self.variables, self.log_of(name))
        self._processes.append(process)
        wait_until(lambda: self.is_healthy(name), process, name, self.log_of(name))

    def is_healthy(self, name: str) -> bool:
        """What the image's own health check says."""
        check = [sys.executable, str(DOCKER / "health.py"), f"{self.address_of(name)}:9099"]
        return subprocess.run(check, capture_output=True, check=False).returncode == 0

    def _mount(self, service: Service) -> None:
        root = self.root_of(service.name)
        for target, source in {"/state": "", "/output": "", **service.mounts}.items():
            link = root / target.removeprefix("/")
            if not source:  # the image has it
                link.mkdir(parents=True)
                continue
            real = Path(source) if source.startswith("/") else self.folder / "volumes" / source
            if not source.startswith("/"):
                real.mkdir(parents=True, exist_ok=True)
            assert real.exists(), f"{service.name}: {real} is to be mounted"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(real)

    def _translated(self, service: Service, word: str) -> str:
        own = self.address_of(service.name)
        word = word.replace("0.0.0.0", own).replace("127.0.0.1:9099", f"{own}:9099")
        for name in self._services:
            word = re.sub(rf"(?<=[=]){name}(?=:\d)", self.address_of(name), word)
        # The paths in a node's configuration are for its ClientApps.
        reader = self._clientapp_of(service) if word.startswith("--node-config") else service.name
        return _CONTAINER_PATH.sub(lambda _: f"{self.root_of(reader)}/", word)

    def _clientapp_of(self, supernode: Service) -> str:
        address = f"{supernode.name}:{supernode.option('--port')}"
        (name,) = [one.name for one in self._services.values() if one.option("--runtime-api-address") == address]
        return name
