"""What becomes of replies and rounds is on disk, a line of JSON each, while a run goes on."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

import client_app
import server_app
from fedpm_flwr import messages
from fedpm_flwr.config import Config
from fedpm_flwr.events import event, events_to
from fedpm_flwr.inline import run_inline
from fedpm_flwr.packing import packed_arrays

LOG = logging.getLogger("flwr")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_event_is_a_line_with_its_facts(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for number in (1, 2):  # a run that is taken up goes on with the file
        with events_to(path):
            LOG.info("not one of ours")
            LOG.debug("text %d", number, extra=event("reply", round=number, node=2**63, partition=None))
    LOG.debug("too late", extra=event("reply", round=9))
    first, second = lines(path)
    assert (first["event"], first["level"], first["round"], first["node"]) == ("reply", "DEBUG", 1, 2**63)
    assert first["partition"] is None
    assert first["time"].endswith("+00:00")
    assert second["round"] == 2


def test_where_they_cannot_be_written_the_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with events_to(Path("/dev/full")):
        for _ in range(3):
            LOG.debug("text", extra=event("reply"))
    said = capsys.readouterr()
    assert said.out.count("events could not be written, the run goes on: [Errno 28]") == 1
    assert "Traceback" not in said.err


def test_a_disk_that_is_full_for_a_while_costs_whole_lines(tmp_path: Path) -> None:
    """In a process that may for a while write no file of more than 400 bytes."""
    path = tmp_path / "events.jsonl"
    code = """
import logging, resource, signal, sys
from pathlib import Path
from fedpm_flwr.events import event, events_to
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (400, most))
with events_to(Path(sys.argv[1])):
    for number in range(20):
        if number == 15:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        logging.getLogger("flwr").warning("text", extra=event("reply", round=number))
"""
    told = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True).stdout
    assert told.count("events could not be written, the run goes on: ") == 1
    rounds = [one["round"] for one in lines(path)]
    assert 1 < len(rounds) < 20
    assert rounds[-5:] == [15, 16, 17, 18, 19]


def test_a_run_tells_every_reply_and_why_one_is_left_out(tmp_path: Path) -> None:
    broken = ClientApp(mods=[packed_arrays])

    @broken.train()
    def train(message: Message, context: Context) -> Message:
        if messages.partition_of(context)[0] == 1 and messages.server_round_of(message) == 2:
            raise RuntimeError("no disk")
        return client_app.train(message, context)

    @broken.query(messages.PARTITION_ACTION)
    def partition(message: Message, context: Context) -> Message:
        return messages.partition_reply(message, context)

    settings: dict[str, Any] = {
        "model": "linear",
        "local-steps": 1,
        "num-server-rounds": 2,
        "checkpoint-every": 2,
        "alpha": 1.0,
    }
    config = Config.from_run_config({**settings, "output": str(tmp_path), "codec": "diagonal"})
    run_inline(server_app.app, broken, 2, config.to_run_config())
    told = lines(tmp_path / "events.jsonl")
    replies = [one for one in told if one["event"] == "reply" and one["round"] is not None]
    assert sorted((one["round"], one["partition"]) for one in replies) == [(1, 0), (1, 1), (2, 0)]
    rows = json.loads((tmp_path / "metrics.json").read_text())
    for row in rows[1:]:
        assert sum(one["bytes"] for one in replies if one["round"] == row["round"]) == row["uplink-bytes"]
    assert all(0 <= one["seconds"] < 60 for one in replies)
    (left_out,) = [one for one in told if one["event"] == "left-out"]
    assert (left_out["round"], left_out["partition"], left_out["level"]) == (2, 1, "WARNING")
    assert "no disk" in left_out["reason"]
    assert [one["round"] for one in told if one["event"] == "checkpoint"] == [2]
