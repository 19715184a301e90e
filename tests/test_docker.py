"""The files of docker/: what Flower accepts, what fits together, and rules of well-made images.

There is no Docker engine in this suite; tests/deployment/test_containers.py runs the same commands as processes.
"""

import fnmatch
import json
import os
import re
import subprocess
import sys
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
import yaml

from fedpm_flwr import __version__

from .compose import DOCKER, Service, services

ROOT = DOCKER.parent
GUIDE = (ROOT / "docs" / "deployment.md").read_text()
(_COMMAND,) = re.findall(r"^ +(SUPERLINK=.*) \\\n.*compose\.client\.yaml", GUIDE, flags=re.MULTILINE)
VARIABLES = dict(word.split("=") for word in _COMMAND.split())
"""What the guide tells a site to say."""
SETS = (
    ("compose.yaml",),
    ("compose.yaml", "compose.state.yaml"),
    ("compose.yaml", "compose.tls.yaml"),
    ("compose.yaml", "compose.tls.yaml", "compose.state.yaml"),
    ("compose.server.yaml",),
    ("compose.client.yaml",),
    ("compose.client.yaml", "compose.gpu.yaml"),
)
SERVICES = {
    "+".join([*files, service.name]): service for files in SETS for service in services(files, VARIABLES).values()
}
ALL = [pytest.param(service, id=name) for name, service in SERVICES.items()]
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
INSTRUCTIONS = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
INSTRUCTIONS = [line for line in INSTRUCTIONS if line.strip()]


WRONG = [("flower-superlink", "--fleet-api-type=grpc-bidi"), ("flower-supernode", "--port=123456")]
_ASK = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import entry_points

told = []
for words in json.load(sys.stdin):
    (script,) = entry_points(group="console_scripts", name=words[0])
    sys.argv, said = [*words, "--help"], io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        try:
            script.load()()
        except SystemExit as ended:
            told.append([ended.code, said.getvalue()])
json.dump(told, sys.stdout)
"""


@cache
def helps() -> dict[tuple[str, ...], tuple[int, str]]:
    """What Flower's scripts end with and say, with ``--help`` last: all in one process, which imports once."""
    commands = {(*service.command,) for service in SERVICES.values()}
    asked = sorted({*commands, *((command[0],) for command in commands), *WRONG})
    variables = {**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _ASK],
        input=json.dumps(asked),
        env=variables,
        capture_output=True,
        text=True,
        check=True,
    )
    told = json.loads(done.stdout)
    return {command: (status, said) for command, (status, said) in zip(asked, told, strict=True)}


def test_every_file_is_looked_at() -> None:
    assert {path.name for path in DOCKER.glob("*.yaml")} == {name for files in SETS for name in files}


@pytest.mark.parametrize("service", ALL)
def test_flower_accepts_the_command(service: Service) -> None:
    _, known = helps()[service.command[0],]
    flags = set(re.findall(r"--[a-z][a-z-]+", known))
    assert len(flags) > 5
    assert service.flags <= flags
    status, said = helps()[(*service.command,)]  # it ends at a value that is not allowed, else at --help
    assert status == 0, said


def test_a_flag_or_value_that_flower_does_not_accept_would_be_found() -> None:
    assert [helps()[command][0] for command in WRONG] == [2, 2]
    assert "--fleet-api-adress" not in helps()["flower-superlink",][1]


@pytest.mark.parametrize("service", ALL)
def test_a_service_is_restarted_and_watched_and_has_no_rights_it_does_not_need(service: Service) -> None:
    assert service.settings["restart"] == "unless-stopped"
    assert service.settings["init"] is True
    assert service.settings["cap_drop"] == ["ALL"]
    assert service.settings["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service.settings
    assert "user" not in service.settings
    health = service.option("--health-server-address")
    assert f'CMD ["python", "/opt/health.py", "{health}"]' in DOCKERFILE
    variant = service.settings["build"]["args"]["VARIANT"]
    assert service.image == f"fedpm-flwr:{__version__}-{variant}"
    assert f"-t {service.image} --build-arg VARIANT={variant} ." in DOCKERFILE
    assert (DOCKER / service.settings["build"]["context"]).resolve() == ROOT
    assert ROOT / service.settings["build"]["dockerfile"] == DOCKER / "Dockerfile"


@pytest.mark.parametrize("files", SETS, ids="+".join)
def test_who_calls_whom(files: tuple[str, ...]) -> None:
    """Addresses are those of services that listen there, in the way that the caller expects, and are up first."""
    all_of_them = services(files, VARIABLES)
    for service in all_of_them.values():
        address = service.option("--runtime-api-address") or service.option("--superlink")
        if address is None or address == VARIABLES["SUPERLINK"]:
            continue
        host, port = address.split(":")
        called = all_of_them[host]
        if service.command[0] == "flower-superexec":
            assert port == called.option("--port")
            assert "--isolation=process" in called.command
            secret = "--superexec-auth-secret-file"
            assert service.option(secret) == called.option(secret)
            is_tls = "--ssl-certfile" in called.flags
        else:
            assert f"0.0.0.0:{port}" == called.option("--fleet-api-address")
            is_tls = "--insecure" not in called.flags
            assert ("--auth-supernode-private-key" in service.flags) == ("--enable-supernode-auth" in called.flags)
        assert ("--root-certificates" in service.flags) == is_tls
        assert ("--insecure" in service.flags) == (not is_tls)
        # Compose gives up if a container that another waits for is not healthy, which takes a registered key.
        is_let_in_later = called.command[0] == "flower-supernode"
        assert service.after == {host: "service_started" if is_let_in_later else "service_healthy"}


@pytest.mark.parametrize("service", ALL)
def test_ports_and_paths(service: Service) -> None:
    for published in service.ports:
        *interface, host_port, port = published.split(":")
        assert host_port == port
        assert port in (service.option("--port"), (service.option("--fleet-api-address") or "").split(":")[-1])
        if port == service.option("--port"):
            assert interface == ["127.0.0.1"], "the Control API is for this machine alone"
    for word in service.command:
        for path in re.findall(r"(?<![\w.])/(?:keys|data|output)[\w./-]*", word):
            if path.startswith("/data/"):  # it is read by the ClientApps, not by the SuperNode
                continue
            assert any(path == target or path.startswith(f"{target}/") for target in service.mounts), path


@pytest.mark.parametrize("service", ALL)
def test_what_runs_an_applications_code_sees_no_private_key(service: Service) -> None:
    seen = set(service.mounts.values())
    keys_are_in = [Path(VARIABLES["KEYS"]), *Path(VARIABLES["KEYS"]).parents]
    assert not {str(folder) for folder in keys_are_in} & {source.rstrip("/") or "/" for source in seen}
    assert not any(source.endswith("ca.key") for source in seen)
    assert all(target in service.read_only for target in service.mounts if target.startswith(("/keys", "/data")))
    if service.command[0] == "flower-superexec":
        keys = {source.removeprefix(VARIABLES["KEYS"]) for source in seen if source.startswith(VARIABLES["KEYS"])}
        assert keys <= {"/ca.crt", "/superexec.secret"}


@pytest.mark.parametrize("service", ALL)
def test_a_file_that_is_missing_is_an_error_and_no_new_folder(service: Service) -> None:
    assert service.made_if_missing == set()


def test_keys_beside_the_data_are_not_mounted_with_it() -> None:
    keys = Path(VARIABLES["DATA"]) / "keys"
    clientapp = services(["compose.client.yaml"], {**VARIABLES, "KEYS": str(keys)})["clientapp"]
    paths = {Path(source) for source in clientapp.mounts.values() if source.startswith("/")}
    assert paths == {keys / "superexec.secret", Path(VARIABLES["DATA"]) / VARIABLES["DATA_FILE"]}


def test_state_that_is_kept_is_each_ones_own() -> None:
    kept = services(("compose.yaml", "compose.tls.yaml", "compose.state.yaml"), VARIABLES)
    state = {name: service.mounts["/state"] for name, service in kept.items() if "/state" in service.mounts}
    assert set(state) == {"superlink", "serverapp", "clientapp-1", "clientapp-2", "clientapp-3"}
    assert all(one != other for one, other in combinations(state.values(), 2))
    nodes = [service for service in kept.values() if service.command[0] == "flower-supernode"]
    places = [str(service.option("--node-config")) for service in nodes]
    assert [re.findall(r"partition-id=(\d)", place) for place in places] == [["0"], ["1"], ["2"]]
    assert all('num-partitions=3 state-folder="/state"' in place for place in places)


def test_a_gpu_is_reserved_for_clientapps() -> None:
    clientapp = services(("compose.client.yaml", "compose.gpu.yaml"), VARIABLES)["clientapp"]
    (device,) = clientapp.settings["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}


def test_what_is_not_given_is_asked_for() -> None:
    for files, names in ((SETS[4], {"KEYS"}), (SETS[5], set(VARIABLES))):
        for name in names:
            with pytest.raises(KeyError, match=name):
                services(files, {key: value for key, value in VARIABLES.items() if key != name})


def test_the_image() -> None:
    words = [line.split(maxsplit=1)[0] for line in INSTRUCTIONS if not line.startswith(" ")]
    assert words.count("FROM") == 2
    assert re.search(r"^ARG BASE=python:3\.11\.\d+-slim-[a-z]+$", DOCKERFILE, flags=re.MULTILINE)
    last_stage = INSTRUCTIONS[max(n for n, line in enumerate(INSTRUCTIONS) if line.startswith("FROM")) :]
    user = [line for line in last_stage if line.startswith("USER")][-1]
    assert re.fullmatch(r"USER (?!0)\d+:(?!0)\d+", user)
    assert not any(re.search(r"\b(apt|apt-get|gcc|sudo|curl|wget)\b", line) for line in INSTRUCTIONS)
    assert not any(line.startswith("ADD") for line in INSTRUCTIONS)
    assert not any("pip install" in line for line in last_stage)
    assert sum(line.startswith("COPY --from=build") for line in last_stage) == 1
    assert not re.search(r"(SECRET|PASSWORD|TOKEN|\.key)\b", DOCKERFILE)
    after_user = last_stage[last_stage.index(user) :]
    assert not any(line.startswith(("RUN", "COPY")) for line in after_user)
    (health,) = [line for line in INSTRUCTIONS if line.startswith("HEALTHCHECK")]
    assert "--start-period=" in health


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    kept = [line.removeprefix("!") for line in ignored if line.startswith("!")]
    assert "*" in ignored
    for line in INSTRUCTIONS:
        if line.startswith("COPY") and "--from" not in line:
            for source in line.split()[1:-1]:
                source = source.removeprefix("./")
                assert (ROOT / source).exists(), source
                assert any(fnmatch.fnmatch(source, one) for one in kept), source
    assert not any("key" in one or "data" in one or "runs" in one for one in kept)


def test_the_yaml_is_plain() -> None:
    for path in DOCKER.glob("*.yaml"):
        assert "\t" not in path.read_text()
        assert "version" not in yaml.safe_load(path.read_text()), "Compose has no use for it any more"
