"""What goes wrong in a deployment: each ends with the run finished and correct, or taken up to the same result.

The oracle is the same run in one process, with the clients missing that the fault has cost. Those marked
``faults`` take minutes: ``make test-faults``.
"""

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from scripts.application import copy_application
from scripts.certificates import make
from scripts.federation import Federation
from scripts.processes import CHECKOUT

from .helpers import COMPLETED, Background, apps, check_same_model, config, run_in_one_process, wait_for

NODES = 2
CORRECTED: dict[str, Any] = {"algorithm": "fedpm-corrected"}
"""Its clients keep state that must fit the round: a run taken up wrongly ends elsewhere."""

_BROKEN = '''
"""Clients that fail as their node's configuration says."""

from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp

from fedpm_flwr import honest, messages
from fedpm_flwr.packing import packed_arrays

app = ClientApp(mods=[packed_arrays])


@app.train()
def train(message: Message, context: Context) -> Message:
    fault = context.node_config.get("fault")
    if fault == "raises" and messages.server_round_of(message) == 2:
        raise RuntimeError("out of beans")
    reply = honest.train(message, context)
    if fault == "sends too much":
        reply.content["curvature"] = ConfigRecord({"payload": bytes(1_000_000)})
    return reply


@app.query(messages.PARTITION_ACTION)
def partition(message: Message, context: Context) -> Message:
    return honest.partition(message, context)
'''


def start_nodes(federation: Federation, nodes: int = NODES) -> None:
    for number in range(nodes):
        federation.start_node(f"site-{number}", f"partition-id={number} num-partitions={nodes}")


def clients(run: Background) -> list[int]:
    return [row["clients"] for row in run.rows()]


def kill_app(federation: Federation, site: str, run: Background, server_round: int) -> None:
    """SIGKILL the ClientApp that works for this round."""
    run.wait_for_round(server_round - 1)
    before = [one.pid for one in apps(federation.nodes[site], "flwr-clientapp")]  # of the round before
    (app,) = wait_for(lambda: apps(federation.nodes[site], "flwr-clientapp", but=before), "a ClientApp")
    app.kill()


@pytest.mark.faults
def test_clients_that_raise_have_no_data_or_send_too_much(tmp_path: Path) -> None:
    honest = (CHECKOUT / "client_app.py").read_text()
    replaced = {"client_app.py": _BROKEN, "fedpm_flwr/honest.py": honest}
    checkout = copy_application(tmp_path / "fedpm-broken", replaced)
    settings = {"num_server_rounds": 2, "min_available_nodes": 4, "max_payload_mb": 0.1}
    faults = ("", 'fault="raises"', f'data-path="{tmp_path}/nowhere.npz"', 'fault="sends too much"')
    with Federation(tmp_path / "federation", checkout=checkout) as federation:
        for number, fault in enumerate(faults):
            federation.start_node(f"site-{number}", f"partition-id={number} num-partitions=4 {fault}")
        run = Background(federation, config(tmp_path / "run", **settings))
        assert run.status() == COMPLETED
    assert clients(run) == [0, 2, 1]
    reasons = {
        (told["round"], told["partition"]): told["reason"]
        for told in run.events("left-out")
        if told["partition"] is not None
    }
    assert set(reasons) == {(2, 1), (1, 3), (2, 3)}
    assert "out of beans" in reasons[2, 1]
    assert "1000000 bytes" in reasons[1, 3]
    without_data = [told["reason"] for told in run.events("left-out") if told["partition"] is None]
    assert len(without_data) == 2
    assert all("nowhere.npz" in reason for reason in without_data)
    expected = run_in_one_process(tmp_path / "inline", 4, [(2, 1), (1, 2), (2, 2), (1, 3), (2, 3)], **settings)
    check_same_model(tmp_path / "run", expected)


@pytest.mark.faults
def test_a_run_that_is_stopped_leaves_its_last_good_model_and_is_taken_up(tmp_path: Path) -> None:
    settings = {**CORRECTED, "num_server_rounds": 2}
    expected = run_in_one_process(tmp_path / "inline", NODES, **settings)
    first = run_in_one_process(tmp_path / "first", NODES, num_server_rounds=1, **CORRECTED)
    with Federation(tmp_path / "federation") as federation:
        start_nodes(federation)
        run = Background(federation, config(tmp_path / "run", **settings))
        run.wait_for_round(1)
        federation.stop()
        assert run.status() == "finished:stopped"
        wait_for((tmp_path / "run" / "model.safetensors").exists, "the model")
        wait_for(lambda: not apps(federation.superlink, "flwr-serverapp"), "the end of the ServerApp")
        check_same_model(tmp_path / "run", first)
        again = config(tmp_path / "run", **settings, resume=str(tmp_path / "run"))
        assert federation.run(again) == COMPLETED
    check_same_model(tmp_path / "run", expected)


def break_off(federation: Federation, run: Background, kill: str, *, during_aggregation: bool) -> None:
    """SIGKILL the SuperLink or the ServerApp after round 2, or in round 3 while one of two replies is there."""
    if during_aggregation:
        run.wait_for_round(2)
        late = federation.nodes["site-1"]
        late.send_signal(signal.SIGSTOP)
        wait_for(lambda: [one for one in run.events("reply") if one["round"] == 3], "a reply in round 3")
    else:
        run.wait_for_round(2)
    if kill == "superlink":
        assert federation.superlink is not None
        federation.superlink.kill()
        federation.superlink.wait()
    else:
        (app,) = apps(federation.superlink, "flwr-serverapp")
        app.kill()
    if during_aggregation:
        late.send_signal(signal.SIGCONT)
    assert run.status() != COMPLETED
    if kill == "superlink":
        federation.start_superlink()


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 4
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.faults
@pytest.mark.parametrize(
    ("kill", "during_aggregation", "damage"),
    [
        ("superlink", True, flip_a_bit),
        ("superlink", False, None),
        ("serverapp", True, cut_short),
        ("serverapp", False, None),
    ],
)
def test_a_killed_server_is_taken_up_from_its_newest_good_checkpoint(
    tmp_path: Path, kill: str, during_aggregation: bool, damage: object
) -> None:
    settings = CORRECTED
    expected = run_in_one_process(tmp_path / "inline", NODES, **settings)
    with Federation(tmp_path / "federation") as federation:
        start_nodes(federation)
        run = Background(federation, config(tmp_path / "run", **settings))
        break_off(federation, run, kill, during_aggregation=during_aggregation)
        newest = tmp_path / "run" / "checkpoints" / "round-2.safetensors"
        assert newest.is_file()
        if callable(damage):
            damage(newest)
        again = config(tmp_path / "run", **settings, resume=str(tmp_path / "run"))
        assert federation.run(again) == COMPLETED
        log = (tmp_path / "federation" / "flower.log").read_text()
        assert f"taken up after round {1 if damage else 2} of" in log
        if damage:
            assert "a checkpoint cannot be used, the one before it is" in log
    check_same_model(tmp_path / "run", expected)
    assert [row["round"] for row in run.rows()] == [0, 1, 2, 3]


@pytest.mark.faults
def test_a_killed_clientapp_is_started_again(tmp_path: Path) -> None:
    """By Flower, half a minute later; what it keeps is as if it had been so at once."""
    with Federation(tmp_path / "federation") as federation:
        start_nodes(federation)
        run = Background(federation, config(tmp_path / "run", **CORRECTED))
        kill_app(federation, "site-1", run, 2)
        assert run.status() == COMPLETED
    assert clients(run) == [0, 2, 2, 2]
    assert run.rows()[2]["seconds"] > 20
    check_same_model(tmp_path / "run", run_in_one_process(tmp_path / "inline", NODES, **CORRECTED))


@pytest.mark.faults
def test_a_killed_supernode_costs_its_reply_and_comes_back(tmp_path: Path) -> None:
    with Federation(tmp_path / "federation") as federation:
        start_nodes(federation)
        run = Background(federation, config(tmp_path / "run"))
        run.wait_for_round(1)
        wait_for(lambda: apps(federation.nodes["site-1"], "flwr-clientapp"), "a ClientApp")
        federation.nodes["site-1"].kill()
        federation.nodes["site-1"].wait()
        federation.start_node("site-1", f"partition-id=1 num-partitions={NODES}")
        assert run.status() == COMPLETED
    assert clients(run) == [0, 2, 1, 2]
    (left_out,) = run.events("left-out")
    assert (left_out["round"], left_out["partition"]) == (2, 1)
    log = (tmp_path / "federation" / "flower.log").read_text()
    assert "several nodes hold the same partition" not in log
    check_same_model(tmp_path / "run", run_in_one_process(tmp_path / "inline", NODES, [(2, 1)]))


@pytest.mark.faults
def test_a_killed_authenticated_supernode_comes_back_when_it_is_started_until_it_is_let_in(tmp_path: Path) -> None:
    sites = [f"site-{number}" for number in range(NODES)]
    make(tmp_path / "certificates", ["localhost", "127.0.0.1"], sites)
    place = f"partition-id=1 num-partitions={NODES}"
    with Federation(tmp_path / "federation", tmp_path / "certificates") as federation:
        for site in sites:
            federation.register(site)
        start_nodes(federation)
        run = Background(federation, config(tmp_path / "run", num_server_rounds=6, round_timeout=100.0))
        run.wait_for_round(1)
        federation.nodes["site-1"].kill()
        federation.nodes["site-1"].wait()
        tries, node, end = 0, federation.nodes["site-1"], time.monotonic() + 180
        while node.poll() is not None:  # as a restart policy does
            assert time.monotonic() < end, f"refused {tries} times"
            node, tries = federation.start_node("site-1", place), tries + 1
            with suppress(subprocess.TimeoutExpired):  # it has been let in, and stays
                node.wait(20)
        assert run.status() == COMPLETED
        assert node.poll() is None
    assert clients(run)[-1] == NODES
    assert tries > 1


@pytest.mark.faults
def test_a_supernode_that_stalls_past_the_timeout_is_named_and_comes_back(tmp_path: Path) -> None:
    # Less than the 30 s in which Flower itself finds the first heartbeat missing; a busy machine may need more for
    # a reply, so that other rounds lose some too.
    settings = {"round_timeout": 25.0, "num_server_rounds": 5}
    with Federation(tmp_path / "federation") as federation:
        start_nodes(federation)
        run = Background(federation, config(tmp_path / "run", **settings))
        run.wait_for_round(1)
        federation.nodes["site-1"].send_signal(signal.SIGSTOP)
        run.wait_for_round(2)
        federation.nodes["site-1"].send_signal(signal.SIGCONT)
        assert run.status() == COMPLETED
    silent = [(told["round"], partition) for told in run.events("silent") for partition in told["partitions"]]
    assert (2, 1) in silent
    assert "(partition 1)" in (tmp_path / "federation" / "flower.log").read_text()
    assert NODES in clients(run)[3:], "it takes part again"
    check_same_model(tmp_path / "run", run_in_one_process(tmp_path / "inline", NODES, silent, **settings))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "small", folder], check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.faults
def test_a_full_and_an_unwritable_disk_cost_checkpoints_and_nothing_else(tmp_path: Path, small_disk: Path) -> None:
    settings: dict[str, Any] = {"num_server_rounds": 4}
    filler = small_disk / "filler"
    with Federation(tmp_path / "federation") as federation:
        start_nodes(federation)
        run = Background(federation, config(tmp_path / "run", **settings))
        run.wait_for_round(1)
        wait_for(lambda: run.events("checkpoint"), "the checkpoint of round 1")
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        wait_for(lambda: len(run.events("no-checkpoint")) == 1, "the checkpoint of round 2, which fails")
        filler.unlink()
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
        wait_for(lambda: len(run.events("no-checkpoint")) == 2, "the checkpoint of round 3, which fails")
        subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
        assert run.status() == COMPLETED
    full, unwritable = run.events("no-checkpoint")
    assert (full["round"], unwritable["round"]) == (2, 3)
    assert "No space left on device" in full["reason"]
    assert "Read-only file system" in unwritable["reason"]
    assert sorted(path.name for path in small_disk.iterdir()) == ["round-1.safetensors", "round-4.safetensors"]
    check_same_model(tmp_path / "run", run_in_one_process(tmp_path / "inline", NODES, **settings))
