"""The topologies of docker/, by their own commands, as processes: they train, and end as one process does."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpm_flwr.tasks import client_data
from scripts.certificates import make
from scripts.federation import SPEAKS_GRPC
from scripts.processes import CHECKOUT, of_home
from scripts.simulate import follow, run_status
from tests.compose import Service, services

from .containers import Containers
from .helpers import COMPLETED, check_same_model, config, run_in_one_process

pytestmark = pytest.mark.skipif(not SPEAKS_GRPC, reason="the image has the Flower that speaks gRPC")
NODES = 3
SITES = [f"site-{number}" for number in range(1, NODES + 1)]
NODE_NAMES = {f"supernode-{number}" for number in range(1, NODES + 1)}
SETTINGS: dict[str, Any] = {"num_server_rounds": 2, "min_available_nodes": NODES}


def flwr(containers: Containers, *arguments: str) -> None:
    done = subprocess.run(
        ["flwr", *arguments], env=containers.variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def connect(containers: Containers, keys: Path | None) -> None:
    """As a user on the host of the server does, once the server is up."""
    connection = ['[superlink]\ndefault = "docker"\n', "[superlink.docker]"]
    connection.append(f'address = "{containers.address_of("superlink")}:8000"')
    connection.append(f"root-certificates = {json.dumps(str(keys / 'ca.crt'))}" if keys else "insecure = true")
    (containers.home / "config.toml").write_text("\n".join(connection) + "\n")
    for site in SITES:
        if keys:
            key = str(keys / "sites" / f"{site}.pub")
            flwr(containers, "supernode", "register", key, "docker", "--name", site)


def train(containers: Containers) -> Path:
    output = containers.root_of("serverapp") / "output" / "run"
    settings = containers.folder / "run-config.toml"
    # Where clients keep their state is for their nodes to say here.
    settings.write_text(replace(config(output, **SETTINGS), state_folder="").to_toml())
    command = ["flwr", "run", str(CHECKOUT), "docker", "--stream", "--run-config", str(settings)]
    follow(command, containers.variables, containers.folder / "flower.log")
    assert run_status(containers.variables, "docker") == COMPLETED
    return output


@pytest.mark.faults
@pytest.mark.parametrize(
    "files",
    [("compose.yaml",), ("compose.yaml", "compose.tls.yaml", "compose.state.yaml")],
    ids="+".join,
)
def test_everything_on_one_host(tmp_path: Path, files: tuple[str, ...]) -> None:
    keys = tmp_path / "keys" if "compose.tls.yaml" in files else None
    containers = Containers(tmp_path / "host", services(files, {"KEYS": str(keys)}))
    if keys:
        make(keys, ["superlink", "localhost", "127.0.0.1", containers.address_of("superlink")], SITES)
    with containers:
        containers.up()
        if keys:
            containers.wait_until_refused(NODE_NAMES)
        connect(containers, keys)
        containers.wait_until_healthy()
        refused = NODE_NAMES & set(containers.restarts)
        assert refused == (NODE_NAMES if keys else set()), "before their keys are registered, and only then"
        check_same_model(train(containers), run_in_one_process(tmp_path / "inline", NODES, **SETTINGS))
        volumes = containers.folder / "volumes"
        assert (volumes / "output" / "run" / "model.safetensors").is_file()
        assert (volumes / "superlink-state" / "superlink.db").is_file() == ("compose.state.yaml" in files)
    assert not of_home(containers.home)


def site(folder: Path, number: int, keys: Path) -> dict[str, Service]:
    """The services of one site's host, with its data and its keys, under names of their own."""
    part = client_data(config(folder), number - 1, NODES)
    inputs, labels = part.dataset[part.indices]
    folder.mkdir()
    np.savez(folder / "digits.npz", x_train=inputs.numpy(), y_train=labels.numpy())
    variables = {
        "KEYS": str(keys),
        "SITE": f"sites/site-{number}",
        "SUPERLINK": "superlink:9092",
        "PARTITION": str(number - 1),
        "PARTITIONS": str(NODES),
        "DATA": str(folder),
        "DATA_FILE": "digits.npz",
    }
    return {
        f"{name}-{number}": replace(
            one,
            name=f"{name}-{number}",
            command=[word.replace("=supernode:", f"=supernode-{number}:") for word in one.command],
            mounts={
                target: source if source.startswith("/") else f"site-{number}-{source}"
                for target, source in one.mounts.items()
            },
        )
        for name, one in services(["compose.client.yaml"], variables).items()
    }


@pytest.mark.faults
def test_hosts_of_a_server_and_three_sites(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    all_of_them = services(["compose.server.yaml"], {"KEYS": str(keys)})
    for number in range(1, NODES + 1):
        all_of_them |= site(tmp_path / f"site-{number}", number, keys)
    containers = Containers(tmp_path / "hosts", all_of_them)
    make(keys, ["superlink", "localhost", "127.0.0.1", containers.address_of("superlink")], SITES)
    with containers:
        containers.up()
        containers.wait_until_refused(NODE_NAMES)  # their keys are not registered yet
        connect(containers, keys)
        containers.wait_until_healthy()
        assert set(containers.restarts) >= NODE_NAMES
        check_same_model(train(containers), run_in_one_process(tmp_path / "inline", NODES, **SETTINGS))
        assert (containers.folder / "volumes" / "superlink-state" / "superlink.db").is_file()
    assert not of_home(containers.home)
