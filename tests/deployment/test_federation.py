"""Federations over gRPC, plain and with TLS and keys, end where the same run ends in one process."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

import client_app
import server_app
from fedpm_flwr.config import Config
from fedpm_flwr.inline import run_inline
from fedpm_flwr.tasks import client_data
from scripts.certificates import make
from scripts.federation import SPEAKS_GRPC, Federation
from scripts.processes import of_home

NODES, ROUNDS = 2, 2
SETTINGS: dict[str, object] = {
    "model": "linear",
    "alpha": 1.0,
    "local-steps": 2,
    "num-server-rounds": ROUNDS,
    "min-available-nodes": NODES,
    "checkpoint-every": 1,
}
_LIMIT_S = 60


def config(folder: Path) -> Config:
    return Config.from_run_config({**SETTINGS, "output": str(folder)})


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in one process; tests/test_simulation.py holds that Ray's is the same to the bit."""
    folder = tmp_path_factory.mktemp("inline")
    run_inline(server_app.app, client_app.app, NODES, config(folder).to_run_config())
    return folder


def check_same(folder: Path, expected: Path) -> None:
    for name in ("model.safetensors", f"checkpoints/round-{ROUNDS}.safetensors"):
        assert (folder / name).is_file()
    models = [load_file(one / "model.safetensors") for one in (folder, expected)]
    for key, value in models[0].items():
        np.testing.assert_allclose(value, models[1][key], rtol=1e-5, atol=1e-6, err_msg=key)
    rows = json.loads((folder / "metrics.json").read_text())
    assert [row["clients"] for row in rows] == [0, *[NODES] * ROUNDS]


def said(log: Path, *words: str) -> bool:
    """Whether a log comes to hold these words."""
    end = time.monotonic() + _LIMIT_S
    while time.monotonic() < end:
        text = log.read_text() if log.exists() else ""
        if all(word in text for word in words):
            return True
        time.sleep(0.2)
    return False


@pytest.mark.faults
def test_without_tls(tmp_path: Path, expected: Path) -> None:
    with Federation(tmp_path / "federation") as federation:
        for number in range(NODES):
            federation.start_node(f"site-{number}", f"partition-id={number} num-partitions={NODES}")
        assert federation.run(config(tmp_path / "run")) == "finished:completed"
    check_same(tmp_path / "run", expected)
    assert not of_home(federation.home)


def test_with_tls_and_keys_from_the_sites_own_files_and_strangers_refused(tmp_path: Path, expected: Path) -> None:
    certificates, others = tmp_path / "certificates", tmp_path / "others"
    make(certificates, ["localhost", "127.0.0.1"], ["site-0", "site-1", "stranger"])
    make(others, ["localhost", "127.0.0.1"], [])
    trusted = ("--root-certificates", str(certificates / "ca.crt"))
    known = ("--auth-supernode-private-key", str(certificates / "sites" / "site-0"))
    unknown = ("--auth-supernode-private-key", str(certificates / "sites" / "stranger"))
    federation = Federation(tmp_path / "federation", certificates)
    federation.variables["GRPC_VERBOSITY"] = "info"
    with federation:
        del federation.variables["GRPC_VERBOSITY"]  # it was for the SuperLink
        for number in range(NODES):
            part = client_data(config(tmp_path), number, NODES)
            inputs, labels = part.dataset[part.indices]
            path = tmp_path / f"{number}.npz"
            np.savez(path, x_train=inputs.numpy(), y_train=labels.numpy())
            federation.register(f"site-{number}")
            place = f'partition-id={number} num-partitions={NODES} data-path="{path}"'
            federation.start_node(f"site-{number}", place)
        place = f"partition-id=0 num-partitions={NODES}"
        federation.start_node("no-key", place, *trusted)
        federation.start_node("unregistered-key", place, *trusted, *unknown)
        federation.start_node("wrong-ca", place, "--root-certificates", str(others / "ca.crt"), *known)
        federation.start_node("plain", place, "--insecure")
        assert federation.run(config(tmp_path / "run")) == "finished:completed"
        assert said(federation.log_of("no-key"), "SuperNode authentication is enabled")
        assert said(federation.log_of("unregistered-key"), "Failed to activate SuperNode")
        assert said(federation.log_of("wrong-ca"), "CERTIFICATE_VERIFY_FAILED")
        assert said(federation.log_of("plain"), "Connection attempt failed")
        assert not SPEAKS_GRPC or said(federation.log_of("superlink"), "WRONG_VERSION_NUMBER")
        nodes = json.loads(federation.flwr("supernode", "list", "federation", "--format", "json"))["nodes"]
        assert len(nodes) == NODES
    check_same(tmp_path / "run", expected)
    assert not of_home(federation.home)
