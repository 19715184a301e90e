"""The comparison of methods, over real runs, and the table that it makes of them."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from benchmarks.compare import Method, main, plan, table
from benchmarks.runs import rounds_to
from fedpm_flwr.config import Config, ConfigError

ROOT = Path(__file__).resolve().parent.parent


def result_of(out: str) -> dict[str, object]:
    line = out.splitlines()[-1]
    assert line.startswith("RESULT ")
    document: dict[str, object] = json.loads(line.removeprefix("RESULT "))
    return document


def test_methods_meet_on_the_same_seeds(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "compare"
    settings = ["seeds=2", "seed=3", "num-server-rounds=2", f"output={folder}", "model=mlp"]
    algorithms = "algorithms=fedavg:learning-rate=0.3,fedpm"
    code = main(["--nodes", "3", "--jobs", "1", "--output", str(tmp_path / "table.json"), algorithms, *settings])
    out = capfd.readouterr().out
    assert code == 0, out
    document = result_of(out)
    assert document == json.loads((tmp_path / "table.json").read_text())
    rows = document["rows"]
    assert isinstance(rows, list)
    assert [(row["method"], row["settings"], row["seeds"]) for row in rows] == [
        ("fedavg", "learning-rate=0.3", 2),
        ("fedpm", "", 2),
    ]
    for row, name in zip(rows, ("fedavg-learning-rate=0.3", "fedpm"), strict=True):
        runs = [json.loads((folder / f"{name}-seed={seed}" / "metrics.json").read_text()) for seed in (3, 4)]
        accuracies = [rounds[-1]["test-accuracy"] for rounds in runs]
        assert row["accuracy_mean"] == pytest.approx(sum(accuracies) / 2, rel=1e-4)
        early = pytest.approx(sum(rounds[1]["test-accuracy"] for rounds in runs) / 2, rel=1e-4)
        assert row["accuracy_at_quarter"] == row["accuracy_at_half"] == early, "of two rounds the first, not none"
        assert row["accuracy_std"] == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2**0.5, rel=1e-4)
        assert row["uplink_mb"] == pytest.approx(runs[0][1]["uplink-bytes"] * 2 / 1e6, rel=1e-3)
        for seed in (3, 4):
            log = (folder / f"{name}-seed={seed}" / "flower.log").read_text()
            assert "aggregate_train" in log, "by Flower's logger"
            assert "fedpm | round 1/2" in log, "printed"
            assert "Logging error" not in log
    first = [
        json.loads((folder / f"{n}-seed=3" / "metrics.json").read_text())[0]
        for n in ("fedpm", "fedavg-learning-rate=0.3")
    ]
    assert first[0]["test-loss"] == first[1]["test-loss"]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "fedpm | 4/4" in out


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = ["num-server-rounds=1", f"output={tmp_path}", "model=mlp", "max-failed-rounds=1", "seeds=1"]
    code = main(["--nodes", "2", "algorithms=fedavg,fedavg:learning-rate=1e30", *settings])
    captured = capfd.readouterr()
    out = captured.out
    assert code == 1
    assert "left out of the table, since a run failed: fedavg learning-rate=1e30" in captured.err
    assert "fedavg-learning-rate=1e30-seed=0  failed: FailedRoundsError: round 1" in out
    rows = result_of(out)["rows"]
    assert isinstance(rows, list)
    assert len(rows) == 1
    assert rows[0]["rounds_to_best_rival"] is None


@pytest.mark.parametrize(
    ("stop", "when"),
    [(signal.SIGTERM, "at the start"), (signal.SIGTERM, "in a run"), (signal.SIGKILL, "in a run")],
)
def test_a_stopped_comparison_stops_its_runs(tmp_path: Path, stop: signal.Signals, when: str) -> None:
    arguments = ["num-server-rounds=100000", f"output={tmp_path}", "seeds=9"]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.compare", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    end = time.monotonic() + 120
    begun = _has_children if when == "at the start" else _has_rounds
    while not begun(process.pid, tmp_path) and time.monotonic() < end:
        time.sleep(0.2)
    process.send_signal(stop)  # this one alone; SIGINT may be ignored here, as in a job in the background
    try:
        assert process.wait(timeout=60) == (128 + stop if stop is signal.SIGTERM else -stop)
        assert begun is _has_rounds or not list(tmp_path.glob("*/flower.log")), "no run has begun"
        end = time.monotonic() + 120  # one that has nothing to do ends by itself, when it has imported all
        while [p for p in psutil.process_iter() if _session(p) == process.pid]:
            assert time.monotonic() < end
            time.sleep(0.2)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_a_comparison_that_is_stopped_while_git_is_asked_ends_in_order(tmp_path: Path) -> None:
    git = tmp_path / "git"
    git.write_text("#!/bin/sh\necho > asked\nexec sleep 60\n")
    git.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.compare"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": path},
    )
    end = time.monotonic() + 120
    while not (tmp_path / "asked").exists() and time.monotonic() < end:
        time.sleep(0.1)
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM


def _has_children(pid: int, folder: Path) -> bool:
    """Whether it has begun what its runs come from, and not only asked git for the commit."""
    with suppress(psutil.NoSuchProcess):
        return any(child.name() != "git" for child in psutil.Process(pid).children())
    return False


def _has_rounds(pid: int, folder: Path) -> bool:
    return bool(list(folder.glob("*/metrics.json")))


def _session(process: psutil.Process) -> int | None:
    """The session of a process that still runs: one that only waits to be collected does not."""
    with suppress(ProcessLookupError, psutil.NoSuchProcess):
        if process.status() != psutil.STATUS_ZOMBIE:
            return os.getsid(process.pid)
    return None


def rounds(*accuracies: float) -> list[dict[str, float]]:
    return [
        {"round": i, "test-accuracy": accuracy, "test-loss": 1.0, "uplink-bytes": 5e5, "seconds": 2.0}
        for i, accuracy in enumerate(accuracies)
    ]


def test_rounds_to_the_accuracy_with_which_the_best_rival_ends() -> None:
    done = {
        Method("fedavg", "", ()): [rounds(0.1, 0.2, 0.3, 0.35), rounds(0.1, 0.2, 0.9, 0.8)],
        Method("localnewton", "", ()): [rounds(0.1, 0.3, 0.4, 0.5), rounds(0.1, 0.3, 0.4, 0.5)],
        Method("fedpm", "", ()): [rounds(0.1, 0.4, 0.6, 0.7), rounds(0.1, 0.5, 0.6, 0.7)],
    }
    rows = {str(row["method"]): row for row in table(done)}
    assert (rows["fedpm"]["rounds_to_best_rival"], rows["fedpm"]["seeds_reaching_it"]) == (2.0, 1)
    assert (rows["fedavg"]["rounds_to_best_rival"], rows["fedavg"]["seeds_reaching_it"]) == (2.0, 1)
    assert rows["localnewton"]["rounds_to_best_rival"] is None
    assert rows["fedpm"]["uplink_mb"] == pytest.approx(2.0)
    assert rows["fedpm"]["seconds"] == pytest.approx(8.0)
    assert rounds_to(rounds(0.9, 0.1), 0.5) is None


def test_a_loss_that_is_not_finite_is_no_figure() -> None:
    (row,) = table({Method("fedpm", "", ()): [[{**row, "test-loss": float("nan")} for row in rounds(0.1, 0.2)]]})
    assert row["loss_mean"] is None
    assert row["rounds_to_best_rival"] is None


def test_each_method_brings_its_own_settings(tmp_path: Path) -> None:
    given = {
        "algorithms": "fedavg:learning-rate=0.3:batch-size=8,fedpm",
        "learning-rate": 0.2,
        "output": str(tmp_path),
    }
    _, (fedavg, fedpm) = plan(given | {"seeds": 2}, nodes=7)
    assert [config.seed for config in fedavg.configs] == [0, 1]
    assert (fedavg.configs[0].learning_rate, fedavg.configs[0].batch_size) == (0.3, 8)
    assert (fedpm.configs[0].learning_rate, fedpm.configs[0].batch_size) == (0.2, Config().batch_size)
    assert fedpm.configs[0].min_available_nodes == 7
    assert len({config.output for config in fedavg.configs + fedpm.configs}) == 4


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("algorithms=fedsgd", "algorithm='fedsgd' is not allowed"),
        ("algorithms=fedpm,fedpm", "names one twice"),
        ("algorithms=fedpm:alpha", "'alpha' is not of the form KEY=VALUE"),
        ("seeds=0", "seeds=0 is not allowed"),
        ("algorithm=fedpm", "say algorithms="),
        ("nonsense=1", "unknown setting 'nonsense'; allowed: algorithm, dataset"),
        ("algorithms=fedavg:seed=5,fedpm", "seed must be the same for all"),
        ("algorithms=fedavg:output=/x", "output must be the same for all"),
        ("min-available-nodes=11", "min-available-nodes=11, but there are 10 --nodes"),
        ("min-replies=11", "min-replies=11, but 10 clients train"),
        ("dataset=npz:/nowhere/d.npz", "/nowhere/d.npz: there is no such file"),
        ("model=lenet", "model='lenet' takes images of at least 16 x 16"),
        ("output=5", "output='5/"),
        ("--output=/tmp", "--output=/tmp: a folder, not a file"),
        ("--jobs=0", "--jobs=0 is not allowed"),
    ],
)
def test_wrong_settings_are_refused_before_anything_starts(
    argument: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [argument] if argument.startswith("output=") else [argument, f"output={tmp_path}"]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_relative_output_is_refused() -> None:
    with pytest.raises(ConfigError, match="is not an absolute path"):
        plan({"output": "here"}, 3)
