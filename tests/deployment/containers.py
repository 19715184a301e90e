"""The services of docker/ as processes of this machine: their own commands, each at an address of its own."""

import itertools
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path

from scripts.processes import environment, start, stop_all, wait_until
from tests.compose import DOCKER, Service

_NETWORKS = itertools.count(os.getpid() % 200 + 20)
_HEALTHY_S = 120
_CONTAINER_PATH = re.compile(r"(?<![\w./])/(?=(keys|data|state|output)\b)")


class Containers:
    """What ``docker compose up`` would start, in its order; when it is left, all of it is ended.

    A service's name stands for an address 127.N.0.M, and a service sees only the files that are mounted into it.
    """

    def __init__(self, folder: Path, services: Mapping[str, Service]) -> None:
        self.folder, self._services, self._network = folder, services, f"127.{next(_NETWORKS)}.0"
        self.home = folder / "flwr-home"
        self.variables = environment(self.home, 1, 1)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.restarts: Counter[str] = Counter()

    def __enter__(self) -> "Containers":
        self.home.mkdir(parents=True)
        for service in self._services.values():
            self._mount(service)
        return self

    def __exit__(self, *_: object) -> None:
        stop_all(self.home)
        for process in self._processes.values():
            process.wait()

    def address_of(self, service: str) -> str:
        return f"{self._network}.{list(self._services).index(service) + 1}"

    def root_of(self, service: str) -> Path:
        return self.folder / service

    def log_of(self, service: str) -> Path:
        return self.folder / f"{service}.log"

    def up(self) -> None:
        """Start all services, each when those that it waits for are as it wants them."""
        waiting = list(self._services.values())
        while waiting:
            service = next(one for one in waiting if not one.after.keys() & {other.name for other in waiting})
            waiting.remove(service)
            for other, how in service.after.items():
                if how == "service_healthy":
                    process = self._processes[other]
                    wait_until(partial(self.is_healthy, other), process, other, self.log_of(other))
            self._start(service.name)

    def wait_until_refused(self, names: Collection[str]) -> None:
        """Until all of these have ended, as SuperNodes do whose keys are not registered."""
        for name in names:
            try:
                self._processes[name].wait(_HEALTHY_S)
            except subprocess.TimeoutExpired as error:
                raise AssertionError(f"{name} goes on:\n{self.log_of(name).read_text()[-2000:]}") from error

    def wait_until_healthy(self) -> None:
        """Until all are, as their restart policy has it: those that end are started again."""
        end = time.monotonic() + _HEALTHY_S
        while unhealthy := [name for name in self._services if not self.is_healthy(name)]:
            assert time.monotonic() < end, {name: self.log_of(name).read_text()[-2000:] for name in unhealthy}
            for name in unhealthy:
                if self._processes[name].poll() is not None:
                    self.restarts[name] += 1
                    self._start(name)
            time.sleep(0.5)

    def _start(self, name: str) -> None:
        command = [self._translated(self._services[name], word) for word in self._services[name].command]
        self._processes[name] = start(command, self.variables, self.log_of(name))

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
