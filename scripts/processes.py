"""Processes of Flower: an environment of their own, ports, waiting until they serve, ending all of them."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from fedpm_flwr.report import PREFIX

CHECKOUT = Path(__file__).resolve().parent.parent
_START_S = 60
_STOP_S = 5


def environment(home: Path, port: int, control_port: int) -> dict[str, str]:
    """For Flower's commands: settings and a SuperLink of their own, nothing installed, nothing told to anybody."""
    inherited = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}  # no other cluster
    return inherited | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
        "FLWR_LOCAL_CONTROL_API_PORT": str(control_port),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
    }


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def start(command: list[str], variables: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """A process in the background, whose output goes to the end of a file."""
    with log.open("a") as file:
        return subprocess.Popen(
            command, env=variables, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes], name: str, log: Path) -> None:
    """Wait until a process serves.

    Raises:
        SystemExit: with its log, if it ends first, or does not within a minute.
    """
    end = time.monotonic() + _START_S
    while time.monotonic() < end and process.poll() is None:
        if ready():
            return
        time.sleep(0.1)
    raise SystemExit(f"{PREFIX}{name} did not start:\n{log.read_text()}")


def is_healthy(port: int) -> bool:
    """Whether a SuperLink without TLS answers there."""
    with (
        suppress(urllib.error.URLError, OSError),
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2),
    ):
        return True
    return False


def listens(port: int) -> bool:
    """Whether somebody takes connections there."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=2):
        return True
    return False


def exit_on_signals() -> None:
    """Let SIGTERM and SIGHUP end a script by an exception, as SIGINT does, so that it ends what it has started."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: sys.exit(128 + received))


def stop_all(home: Path) -> None:
    """End all that was started with this FLWR_HOME.

    Ray's processes may have lost their parent by then, so they are known by the FLWR_HOME that they inherited,
    which is this run's own.
    """
    # Stopping half would leave the other half behind.
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    if sys.exc_info()[0] is not None:
        with suppress(OSError):  # whoever read this may be what is gone
            print(f"{PREFIX}stopping", file=sys.stderr, flush=True)
    for one in (family := of_home(home)):
        with suppress(psutil.NoSuchProcess):
            one.terminate()
    _, alive = psutil.wait_procs(family, timeout=_STOP_S)
    for one in alive + of_home(home):
        with suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(alive, timeout=_STOP_S)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def of_home(home: Path) -> list[psutil.Process]:
    """All processes but this one that have this FLWR_HOME."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get("FLWR_HOME") == str(home):
                found.append(process)
    return found
