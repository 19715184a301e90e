"""Real simulations: ``flwr run`` over Ray, as ``make run`` starts them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

import client_app
import server_app
from fedpm_flwr.config import Config
from fedpm_flwr.inline import run_inline
from scripts.simulate import main as simulate_main

ROOT = Path(__file__).resolve().parent.parent
_MARK = "FEDPM_TEST_MARK"
_LIMIT_S = 240
Settings = Mapping[str, object]


def start(*arguments: str, checkout: Path = ROOT) -> tuple[subprocess.Popen[str], str]:
    """Start scripts/simulate.py with a mark in its environment, which all that it starts inherits."""
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.simulate", *arguments],
        cwd=checkout,
        env={**os.environ, _MARK: mark, "PYTHONPATH": str(checkout)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    return process, mark


def left_behind(mark: str) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(_MARK) == mark:
                found.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def simulate(folder: Path, nodes: int, settings: Settings, *options: str, checkout: Path = ROOT) -> str:
    arguments = [*options, f"output={folder}", *(f"{key}={value}" for key, value in settings.items())]
    process, mark = start("--nodes", str(nodes), *arguments, checkout=checkout)
    out, err = process.communicate(timeout=_LIMIT_S)
    assert process.returncode == 0, out + err
    assert left_behind(mark) == []
    return out


def images(folder: Path) -> str:
    """CIFAR-10 where FEDPM_CIFAR10 names it as an .npz file; else images of its shape, a colour for each class."""
    path = os.environ.get("FEDPM_CIFAR10")
    if path is None:
        labels = np.arange(80) % 10
        noise = np.random.default_rng(0).integers(0, 60, (80, 32, 32, 3))
        pixels = (noise + 15 * labels[:, None, None, None]).astype(np.uint8)
        path = str(folder / "images.npz")
        np.savez(path, x_train=pixels, y_train=labels, x_test=pixels[:20], y_test=labels[:20])
    return f"npz:{path}"


def text(folder: Path) -> str:
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    return f"text:{folder / 'text.txt'}"


FEW = {"max-train-examples": 64, "batch-size": 8, "local-steps": 2}


@pytest.mark.faults
@pytest.mark.filterwarnings("ignore:no curvature for")  # of norms, and of layers wider than the limit
@pytest.mark.parametrize(
    ("model", "changes"),
    [
        # Layers of more than 600 inputs without curvature: the 4,608 of the last ones take minutes on two cores.
        ("resnet18-gn", {"max-factor-side": 600, "damping": 1.0, "learning-rate": 0.003}),
        ("vit", {"optimizer": "kfac", "clip": 1.0}),
    ],
)
def test_a_round_of_a_model_for_images_on_ray_and_inline(model: str, changes: Settings, tmp_path: Path) -> None:
    """The same model to the last bit, better than before, with curvature on the wire."""
    settings = {**FEW, "model": model, "dataset": images(tmp_path), "num-server-rounds": 1, **changes}
    # Each of Ray's processes imports all anew: one for both clients.
    cpus = f"--cpus={os.cpu_count()}"
    before, after = ray_and_inline(tmp_path, 2, {**settings, "partition": "contiguous"}, cpus)
    assert after["test-loss"] < before["test-loss"]
    assert after["clients"] == 2


def test_several_rounds_of_some_of_the_nodes_on_ray_and_inline(tmp_path: Path) -> None:
    """Of a model for text."""
    settings = {**FEW, "model": "char-lm", "dataset": text(tmp_path), "damping": 1.0, "partition": "contiguous"}
    rows = ray_and_inline(tmp_path, 4, {**settings, "num-server-rounds": 3, "fraction-train": 0.75, "seed": 4})
    assert [row["clients"] for row in rows] == [0, 3, 3, 3]
    assert rows[-1]["test-loss"] < rows[0]["test-loss"]
    for name in ("config.toml", "metrics.csv", "metrics.json", "curves.png", "flower.log"):
        assert (tmp_path / "ray" / name).stat().st_size > 0
    # Once in the server's process, and once in each of Ray's that serve the clients: not once a round.
    read = (tmp_path / "ray" / "flower.log").read_text().count("read text:")
    assert 2 <= read <= 1 + (os.cpu_count() or 1)


def ray_and_inline(folder: Path, nodes: int, settings: Settings, *options: str) -> list[dict[str, float]]:
    """The rounds of a run on Ray, whose model an inline run must give to the last bit; curvature must travel."""
    lines = simulate(folder / "ray", nodes, settings, *options).splitlines()
    assert "done: test accuracy" in lines[-2]
    own = {"output": str(folder / "inline"), "min-available-nodes": nodes}
    run_inline(server_app.app, client_app.app, nodes, Config.from_run_config({**settings, **own}).to_run_config())
    one, two = (load_file(folder / name / "model.safetensors") for name in ("ray", "inline"))
    assert set(one) == set(two)
    for key, value in one.items():
        assert torch.equal(value, two[key]), key
    rows: list[dict[str, float]] = json.loads((folder / "ray" / "metrics.json").read_text())
    size = sum(value.nbytes for value in one.values())
    assert all(row["uplink-bytes"] > 1.05 * row["clients"] * size for row in rows[1:])
    return rows


_BAD_CLIENTS = """

import os

import torch
from flwr.app import ArrayRecord, ConfigRecord

honest, app = app, ClientApp()


@app.train()
def break_the_reply(message: Message, context: Context) -> Message:
    reply = honest(message, context)
    number = messages.partition_of(context)[0]
    if number == 4 and messages.server_round_of(message) == 3:  # it takes its Ray worker along
        os._exit(1)
    if number == 1:  # its model is not finite
        arrays = reply.content[messages.ARRAYS].to_torch_state_dict()
        reply.content[messages.ARRAYS] = ArrayRecord({key: value * torch.nan for key, value in arrays.items()})
    if number == 3:  # its curvature lost its end
        record = reply.content[messages.CURVATURE]
        record[messages.PAYLOAD] = record[messages.PAYLOAD][:-100]
    return reply


@app.query(messages.PARTITION_ACTION)
def say_the_partition(message: Message, context: Context) -> Message:
    return honest(message, context)
"""


def test_bad_clients_are_left_out_and_the_others_train(tmp_path: Path) -> None:
    """A checkout of its own, whose ClientApp breaks two of five clients' replies, and then kills one's worker."""
    checkout = tmp_path / "fedpm-flwr"
    ignored = shutil.ignore_patterns(".*", "runs", "tests", "docs", "__pycache__")
    shutil.copytree(ROOT, checkout, ignore=ignored)
    with (checkout / "client_app.py").open("a") as file:
        file.write(_BAD_CLIENTS)
    settings = {"num-server-rounds": 3, "max-failed-rounds": 1, "alpha": 10.0}
    out = simulate(tmp_path / "run", 5, settings, checkout=checkout)
    for number in (1, 2):
        left_out = [line for line in out.splitlines() if f"round {number}: left out" in line]
        (nan,) = [line for line in left_out if "(partition 1)" in line]
        (cut,) = [line for line in left_out if "(partition 3)" in line]
        assert "is not finite" in nan
        assert "its curvature: not a safetensors document" in cut
    (died,) = [line for line in out.splitlines() if "round 3: left out" in line and "(partition 4)" in line]
    assert "The actor died unexpectedly" in died
    rows = json.loads((tmp_path / "run" / "metrics.json").read_text())
    # Flower goes on giving messages to the worker that is gone, so that others fail with it.
    assert [row["clients"] for row in rows[:3]] == [0, 3, 3]
    assert 1 <= rows[3]["clients"] <= 3
    assert rows[-1]["test-loss"] < rows[0]["test-loss"]
    model = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in model.values())


def test_a_failed_run_does_not_exit_0_and_says_why(tmp_path: Path) -> None:
    process, mark = start("--nodes", "2", f"output={tmp_path}", "num-server-rounds=1", "device=toaster")
    _, err = process.communicate(timeout=_LIMIT_S)
    assert process.returncode == 1
    assert "device='toaster' is not usable here" in err
    assert "the run did not complete (finished:failed)" in err
    assert left_behind(mark) == []


def test_a_stopped_run_leaves_no_process_behind(tmp_path: Path) -> None:
    number = signal.SIGTERM
    process, mark = start("--nodes", "2", f"output={tmp_path}", "num-server-rounds=500")
    assert process.stdout is not None
    for line in process.stdout:
        if "round   1/500" in line:
            break
    process.send_signal(number)
    time.sleep(0.5)
    process.send_signal(number)  # by an impatient hand
    process.communicate(timeout=_LIMIT_S)
    assert process.returncode == 128 + number
    assert left_behind(mark) == []
    assert (tmp_path / "metrics.csv").stat().st_size > 0


_BROKEN_OFF = """
import subprocess, sys
from pathlib import Path
from scripts.processes import stop_all

home = Path(sys.argv[1])
environment = {"FLWR_HOME": str(home), "PATH": "/usr/bin:/bin"}
print(subprocess.Popen(["sleep", "60"], env=environment, stdout=subprocess.DEVNULL).pid, flush=True)
try:
    raise BrokenPipeError
finally:
    stop_all(home)
"""


def test_what_was_started_is_ended_though_nobody_reads_that_any_more(tmp_path: Path) -> None:
    """As in ``make run 2>&1 | head``, or where a terminal is lost."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", _BROKEN_OFF, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=writing, check=False, text=True)
    os.close(writing)
    assert not psutil.pid_exists(int(done.stdout))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("learning_rate=1", "unknown setting 'learning_rate' (do you mean 'learning-rate'?); allowed: algorithm"),
        ("dataset=npz:/nowhere/x.npz", "dataset='npz:/nowhere/x.npz': there is no /nowhere/x.npz on this machine"),
        ("resume=/nowhere", "resume='/nowhere': there is no /nowhere on this machine"),
        ("alpha=0", "alpha=0.0 is not allowed; allowed: number > 0"),
        ("alpha", "'alpha' is not of the form KEY=VALUE"),
        ("--cpus=999", "--cpus=999 is not allowed"),
        ("min-available-nodes=11", "min-available-nodes=11, but there are 10 --nodes"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_starts(
    argument: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("exit_on_signals", "_simulate"):
        monkeypatch.setattr(f"scripts.simulate.{name}", lambda *_: pytest.fail("it was started"))
    assert simulate_main([argument]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert out == ""


def test_a_process_with_a_wrong_setting_exits_2() -> None:
    process, _ = start("--nodes=0")
    out, err = process.communicate(timeout=_LIMIT_S)
    assert process.returncode == 2
    assert "--nodes=0 is not allowed" in err
    assert out == ""
