"""Runs in the background, their processes, and the same runs in one process, with the same clients missing."""

import json
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from safetensors.torch import load_file

import client_app
import server_app
from fedpm_flwr import messages
from fedpm_flwr.config import Config
from fedpm_flwr.inline import run_inline
from fedpm_flwr.packing import packed_arrays
from scripts.federation import Federation

COMPLETED = "finished:completed"
_LIMIT_S = 150
_Found = TypeVar("_Found")


def config(output: Path, **settings: Any) -> Config:
    """A small run that clients keep state in, if it is of ``fedpm_corrected``; settings with _ for -."""
    given: dict[str, Any] = {
        "model": "linear",
        "alpha": 1.0,
        "local-steps": 2,
        "num-server-rounds": 3,
        "min-available-nodes": 2,
        "checkpoint-every": 1,
        "state-folder": str(output.with_name(f"{output.name}-state")),
        "output": str(output),
    }
    return Config.from_run_config(given | {key.replace("_", "-"): value for key, value in settings.items()})


def run_in_one_process(
    folder: Path, nodes: int, missing: Collection[tuple[int, int]] = (), **settings: Any
) -> Path:
    """The same run without processes; ``missing``: rounds, each with a partition that does not reply in it."""
    app = ClientApp(mods=[packed_arrays])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition = messages.partition_of(context)[0]
        if (messages.server_round_of(message), partition) in missing:
            raise RuntimeError("missing")
        return client_app.train(message, context)

    @app.query(messages.PARTITION_ACTION)
    def partition(message: Message, context: Context) -> Message:
        return messages.partition_reply(message, context)

    run_inline(server_app.app, app, nodes, config(folder, **settings).to_run_config())
    return folder


class Background:
    """A run that goes on while its processes are done to."""

    def __init__(self, federation: Federation, config: Config) -> None:
        self.output = Path(config.output or config.resume)
        self._status = ThreadPoolExecutor(1).submit(federation.run, config)

    def rows(self) -> list[dict[str, Any]]:
        with suppress(OSError, ValueError):
            rows: list[dict[str, Any]] = json.loads((self.output / "metrics.json").read_text())
            return rows
        return []

    def events(self, name: str) -> list[dict[str, Any]]:
        path = self.output / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [told for line in lines if (told := json.loads(line))["event"] == name]

    def wait_for_round(self, server_round: int) -> None:
        """Until it has ended."""
        wait_for(lambda: len(self.rows()) > server_round, f"the end of round {server_round}")

    def status(self) -> str:
        """Flower's word on how it ended, once it has."""
        return self._status.result(_LIMIT_S)


def wait_for(find: Callable[[], _Found], what: str) -> _Found:
    """What ``find`` finds, as soon as that is anything."""
    end = time.monotonic() + _LIMIT_S
    while time.monotonic() < end:
        if found := find():
            return found
        time.sleep(0.05)
    raise TimeoutError(f"waited in vain for {what}")


def said(log: Path, *words: str) -> bool:
    """Whether a log comes to hold these words."""
    return wait_for(lambda: log.exists() and all(word in log.read_text() for word in words), f"{words} in {log}")


def apps(process: psutil.Popen | Any, command: str, but: Collection[int] = ()) -> list[psutil.Process]:
    """The ``flwr-clientapp`` or ``flwr-serverapp`` processes that this SuperNode or SuperLink has begun."""
    found = []
    with suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.Error):
                if child.pid not in but and any(command in word for word in child.cmdline()):
                    found.append(child)
    return found


def check_same_model(folder: Path, expected: Path) -> None:
    """To what float32 computes in another process."""
    model, other = (load_file(one / "model.safetensors") for one in (folder, expected))
    assert set(model) == set(other)
    for key, value in model.items():
        np.testing.assert_allclose(value, other[key], rtol=1e-5, atol=1e-6, err_msg=key)
