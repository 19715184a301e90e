"""Run the application in Flower's simulation, from a clean start to a clean end.

    python -m scripts.simulate [--nodes 10] [KEY=VALUE ...]

KEY=VALUE are settings of [tool.flwr.app.config], such as algorithm=localnewton alpha=1.0. The run
has its own SuperLink, FLWR_HOME and ports, shows the application's lines (Flower's own log is in
flower.log of the output folder), and exits 0 only if Flower says that the run completed.
"""

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from fedpm_flwr.config import Config, ConfigError, describe, parse_settings
from fedpm_flwr.report import PREFIX, output_folder

from .application import copy_application
from .processes import CHECKOUT, environment, exit_on_signals, free_ports, is_healthy, start, stop_all, wait_until

_TAIL_LINES = 40


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="settings:\n" + describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--nodes", type=int, default=10, help="virtual clients (default: 10)")
    parser.add_argument("--cpus", type=int, default=1, help="CPU cores for each client (default: 1)")
    parser.add_argument("--gpus", type=float, help="share of a GPU for each client (default: an equal one)")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_args(arguments)
    try:
        _check(given)
        config = _config(given.settings, given.nodes)
    except ConfigError as error:
        print(f"{PREFIX}{error}", file=sys.stderr)
        return 2
    exit_on_signals()
    try:
        return _simulate(config, given)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (OSError, ValueError) as error:
        print(f"{PREFIX}{error}", file=sys.stderr)
        return 1


def _check(given: argparse.Namespace) -> None:
    for name, least in (("nodes", 1), ("cpus", 1), ("gpus", 0)):
        value = getattr(given, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name}={value} is not allowed; allowed: >= {least}")
    if given.cpus > (os.cpu_count() or 1):
        raise ConfigError(f"--cpus={given.cpus} is not allowed; this machine has {os.cpu_count()}")


def _config(settings: list[str], nodes: int) -> Config:
    values: dict[str, Any] = {"min-available-nodes": nodes, **parse_settings(settings)}
    config = Config.from_run_config(values)
    config.check_nodes(nodes)
    for key, value in (("dataset", config.dataset), ("resume", config.resume)):
        path = Path(value.rpartition(":")[2])  # else Flower is started first, and then says so
        if path.is_absolute() and not path.exists():
            raise ConfigError(f"{key}={value!r}: there is no {path} on this machine")
    if config.output:
        output_folder(config)  # likewise
    elif not config.resume:
        folder = CHECKOUT / "runs" / f"{datetime.now():%Y%m%d-%H%M%S}-{config.algorithm}"
        config = Config.from_run_config({**config.to_run_config(), "output": str(folder)})
    return config


def _simulate(config: Config, given: argparse.Namespace) -> int:
    output = Path(config.output or config.resume)
    output.mkdir(parents=True, exist_ok=True)
    wait = "the first round takes longest, up to a minute"
    print(f"{PREFIX}starting Flower's simulation with {given.nodes} clients; {wait}", flush=True)
    with tempfile.TemporaryDirectory(prefix="fedpm-flwr-") as home:
        application = copy_application(Path(home) / "fedpm-flwr")
        settings = Path(home) / "run-config.toml"
        settings.write_text(config.to_toml())
        gpus = _gpu_share(config.device, given.cpus) if given.gpus is None else given.gpus
        federation = (
            f"num-supernodes={given.nodes} client-resources-num-cpus={given.cpus} client-resources-num-gpus={gpus}"
        )
        command = ["flwr", "run", str(application), "--stream", "--run-config", str(settings)]
        with _superlink(Path(home)) as variables:
            log = follow([*command, "--federation-config", federation], variables, output / "flower.log")
            status = run_status(variables)
    if status == "finished:completed":
        return 0
    print("".join(log[-_TAIL_LINES:]), file=sys.stderr)
    print(f"{PREFIX}the run did not complete ({status}); all of the log: {output / 'flower.log'}", file=sys.stderr)
    return 1


def _gpu_share(device: str, cpus: int) -> float:
    """A client's share of a GPU if as many run at once as there are cores for; without one Ray hides them."""
    if not device.startswith(("auto", "cuda")) or shutil.which("nvidia-smi") is None:
        return 0.0
    import torch

    at_once = max((os.cpu_count() or 1) // cpus, 1)
    return min(math.floor(torch.cuda.device_count() / at_once * 1e4) / 1e4, 1.0)  # Ray keeps 4 decimals


def follow(command: list[str], variables: dict[str, str], log_file: Path) -> list[str]:
    """Run a command, show the application's lines of its output, keep all of them."""
    lines = []
    with (
        log_file.open("w") as log,
        subprocess.Popen(
            command, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines.append(line)
                log.write(line)
                if _is_ours(line):
                    print(line, end="", flush=True)
        except BaseException:
            process.terminate()
            raise
    return lines


def _is_ours(line: str) -> bool:
    """Whether a line of Flower's log is the application's: progress, or a warning of the library."""
    return PREFIX in line or ("UserWarning" in line and "fedpm_flwr" in line)


def run_status(variables: dict[str, str], *superlink: str) -> str:
    """What Flower says became of the newest run of this SuperLink."""
    listed = subprocess.run(
        ["flwr", "ls", *superlink, "--format", "json"], env=variables, capture_output=True, text=True, check=False
    )
    try:
        return str(max(json.loads(listed.stdout)["runs"], key=lambda run: run["pending-at"])["status"])
    except (ValueError, LookupError):
        return f"unknown: {listed.stdout.strip() or listed.stderr.strip() or 'no answer'}"


@contextmanager
def _superlink(home: Path) -> Iterator[dict[str, str]]:
    """A SuperLink of our own, in simulation mode; yields the environment that ``flwr`` finds it in."""
    port, control_port = free_ports(2)
    variables = environment(home, port, control_port)
    command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--control-api-address", f"127.0.0.1:{control_port}"]
    log = home / "superlink.log"
    process = start(command, variables, log)
    try:
        wait_until(partial(is_healthy, port), process, "the SuperLink", log)
        yield variables
    finally:
        stop_all(home)
        process.wait()


if __name__ == "__main__":
    sys.exit(main())
