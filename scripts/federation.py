"""A SuperLink and SuperNodes on this machine, as real processes that speak gRPC."""

import json
import subprocess
import tempfile
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import TracebackType

from fedpm_flwr.config import Config

from .application import copy_application
from .processes import CHECKOUT, environment, free_ports, listens, start, stop_all, wait_until
from .simulate import follow, run_status

NAME = "federation"
"""Of the connection in Flower's own configuration file."""
SPEAKS_GRPC = version("flwr").startswith("1.39.")
"""Whether SuperNodes have a gRPC port of their own; on later releases all goes to one port, by HTTP."""


class Federation:
    """Starts a SuperLink when it is entered; when it is left, all that it started is ended.

    Args:
        folder: for logs, Flower's settings and the SuperLink's database.
        certificates: a folder of ``scripts.certificates``: TLS, and only SuperNodes whose key is registered; None:
            neither, as for a laptop.
        checkout: the folder of the application.
    """

    def __init__(self, folder: Path, certificates: Path | None = None, checkout: Path = CHECKOUT) -> None:
        self.folder, self.certificates, self._checkout = folder, certificates, checkout
        self.home = folder / "flwr-home"
        self.port, fleet_port, unused = free_ports(3)
        self.fleet_port = fleet_port if SPEAKS_GRPC else self.port
        self.variables = environment(self.home, self.port, unused)
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.superlink: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Federation":
        self.home.mkdir(parents=True)
        connection = [
            f'[superlink]\ndefault = "{NAME}"\n',
            f"[superlink.{NAME}]",
            f'address = "127.0.0.1:{self.port}"',
        ]
        if self.certificates is None:
            connection.append("insecure = true")
        else:
            connection.append(f"root-certificates = {json.dumps(str(self.certificates / 'ca.crt'))}")
        (self.home / "config.toml").write_text("\n".join(connection) + "\n")
        try:
            self.start_superlink()
        except BaseException:
            stop_all(self.home)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stop_all(self.home)
        for process in (self.superlink, *self.nodes.values()):
            if process is not None:
                process.wait()

    def start_superlink(self) -> None:
        """Start it, or start it again: its nodes and runs are in its database."""
        command = ["flower-superlink", "--host", "127.0.0.1", "--port", str(self.port)]
        if SPEAKS_GRPC:
            command += ["--fleet-api-type", "grpc-rere", "--fleet-api-address", f"127.0.0.1:{self.fleet_port}"]
        command += ["--database", str(self.folder / "superlink.db")]
        if self.certificates is None:
            command += ["--insecure"]
        else:
            command += ["--ssl-ca-certfile", str(self.certificates / "ca.crt"), "--enable-supernode-auth"]
            command += ["--ssl-certfile", str(self.certificates / "server.crt")]
            command += ["--ssl-keyfile", str(self.certificates / "server.key")]
        log = self.folder / "superlink.log"
        self.superlink = start(command, self.variables, log)
        for port in (self.fleet_port, self.port):
            wait_until(partial(listens, port), self.superlink, "the SuperLink", log)

    def register(self, site: str) -> None:
        """Let the SuperNode with this site's key take part."""
        assert self.certificates is not None
        key = self.certificates / "sites" / f"{site}.pub"
        self.flwr("supernode", "register", str(key), NAME, "--name", site)

    def start_node(self, site: str, node_config: str, *options: str) -> subprocess.Popen[bytes]:
        """A SuperNode; ``options`` in place of those by which it finds and trusts the SuperLink."""
        command = ["flower-supernode", "--superlink", f"127.0.0.1:{self.fleet_port}", "--host", "127.0.0.1"]
        command += ["--port", str(free_ports(1)[0]), "--node-config", node_config]
        if options:
            command += options
        elif self.certificates is None:
            command += ["--insecure"]
        else:
            command += ["--root-certificates", str(self.certificates / "ca.crt")]
            command += ["--auth-supernode-private-key", str(self.certificates / "sites" / site)]
        self.nodes[site] = start(command, self.variables, self.log_of(site))
        return self.nodes[site]

    def log_of(self, site: str) -> Path:
        return self.folder / f"{site}.log"

    def run(self, config: Config, checkout: Path | None = None) -> str:
        """Run the application, or another that lies elsewhere; returns Flower's word on how it ended."""
        settings = self.folder / "run-config.toml"
        settings.write_text(config.to_toml())
        with tempfile.TemporaryDirectory(prefix="fedpm-flwr-") as folder:
            application = copy_application(Path(folder) / "fedpm-flwr", checkout=checkout or self._checkout)
            command = ["flwr", "run", str(application), NAME, "--stream", "--run-config", str(settings)]
            follow(command, self.variables, self.folder / "flower.log")
        return run_status(self.variables, NAME)

    def stop(self) -> None:
        """Stop the newest run; it leaves its last good model."""
        runs = json.loads(self.flwr("ls", NAME, "--format", "json"))["runs"]
        self.flwr("stop", max(runs, key=lambda run: str(run["pending-at"]))["run-id"], NAME)

    def flwr(self, *arguments: str) -> str:
        """What a command of Flower's prints.

        Raises:
            RuntimeError: with what it said, if it failed.
        """
        done = subprocess.run(
            ["flwr", *arguments], env=self.variables, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"flwr {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done.stdout
