"""Real simulations: ``flwr run`` over Ray, as ``make run`` starts them."""

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

import client_app
import server_app
from fedpm_flwr.config import Config
from fedpm_flwr.inline import run_inline

ROOT = Path(__file__).resolve().parent.parent
_MARK = "FEDPM_TEST_MARK"
_LIMIT_S = 240


def start(*arguments: str) -> tuple[subprocess.Popen[str], str]:
    """Start scripts/simulate.py with a mark in its environment, which all that it starts inherits."""
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, "scripts/simulate.py", *arguments],
        cwd=ROOT,
        env={**os.environ, _MARK: mark, "PYTHONPATH": str(ROOT)},
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


def simulate(folder: Path, nodes: int, **settings: object) -> str:
    arguments = [f"{key}={value}" for key, value in settings.items()]
    process, mark = start("--nodes", str(nodes), f"output={folder}", *arguments)
    out, err = process.communicate(timeout=_LIMIT_S)
    assert process.returncode == 0, out + err
    assert left_behind(mark) == []
    return out


@pytest.mark.parametrize(
    ("algorithm", "fraction"), [("fedpm", 0.75), ("localnewton", 1.0)], ids=["fedpm-sampled", "localnewton"]
)
def test_ray_and_inline_give_the_same_bits(algorithm: str, fraction: float, tmp_path: Path) -> None:
    settings = {"algorithm": algorithm, "fraction-train": fraction, "num-server-rounds": 3, "seed": 4}
    lines = simulate(tmp_path / "ray", 4, **settings).splitlines()
    assert [line for line in lines if "round 3/3" in line]
    assert "done: test accuracy" in lines[-2]

    inline = Config.from_run_config({**settings, "output": str(tmp_path / "inline"), "min-available-nodes": 4})
    run_inline(server_app.app, client_app.app, 4, inline.to_run_config())

    one = load_file(tmp_path / "ray" / "model.safetensors")
    two = load_file(tmp_path / "inline" / "model.safetensors")
    assert set(one) == set(two)
    for key, value in one.items():
        assert torch.equal(value, two[key]), key
    for name in ("config.toml", "metrics.csv", "metrics.json", "curves.png", "flower.log"):
        assert (tmp_path / "ray" / name).stat().st_size > 0


def test_a_failed_run_does_not_exit_0_and_says_why(tmp_path: Path) -> None:
    process, mark = start("--nodes", "2", f"output={tmp_path}", "num-server-rounds=1", "device=toaster")
    _, err = process.communicate(timeout=_LIMIT_S)
    assert process.returncode == 1
    assert "device='toaster' is not usable here" in err
    assert "the run did not complete (finished:failed)" in err
    assert left_behind(mark) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_run_leaves_no_process_behind(number: signal.Signals, tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("learning_rate=1", "unknown setting 'learning_rate'; allowed: algorithm"),
        ("alpha=0", "alpha=0.0 is not allowed; allowed: number > 0"),
        ("alpha", "'alpha' is not of the form KEY=VALUE"),
        ("--nodes=0", "--nodes=0 is not allowed"),
        ("--cpus=999", "--cpus=999 is not allowed"),
        ("min-available-nodes=11", "min-available-nodes=11, but there are 10 --nodes"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_starts(argument: str, message: str) -> None:
    process, _ = start(argument)
    out, err = process.communicate(timeout=_LIMIT_S)
    assert process.returncode == 2
    assert message in err
    assert out == ""
