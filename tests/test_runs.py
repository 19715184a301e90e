"""The file that keeps runs: what is in it is not run again, and what is not right in it is told."""

import importlib.util
import json
import math
import multiprocessing
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import runs
from benchmarks.provenance import commit, provenance
from benchmarks.runs import Rounds, Store, rounds_to, run_missing, settings_of
from fedpm_flwr.config import Config

CONFIG = Config(model="linear", num_server_rounds=1, local_steps=1)
ROUNDS: Rounds = [
    {"round": 0, "test-accuracy": 0.1, "test-loss": 2.3, "clients": 0, "uplink-bytes": 0, "seconds": 0.5},
    {
        "round": 1,
        "test-accuracy": 0.123456789,
        "test-loss": math.inf,
        "clients": 2,
        "uplink-bytes": 8,
        "seconds": 1,
    },
]


def test_what_is_kept_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "results" / "runs.jsonl"
    Store(path).add(CONFIG, 2, ROUNDS)
    Store(path).add(replace(CONFIG, seed=1), 2, "FailedRoundsError: no")
    store = Store(path)
    run, failed = store.runs
    assert store.find(CONFIG, 2) is run
    assert [row["test-accuracy"] for row in run.rounds] == [0.1, 0.123457]
    assert math.isnan(run.rounds[1]["test-loss"])
    assert run.rounds[1]["uplink-bytes"] == 8
    assert (failed.rounds, failed.failure) == ([], "FailedRoundsError: no")
    assert store.find(CONFIG, 3) is None
    assert store.find(replace(CONFIG, alpha=0.2), 2) is None
    assert {"commit", "flwr", "torch", "python", "accelerator", "command", "date"} <= run.provenance.keys()


def test_where_a_run_was_is_no_part_of_it(tmp_path: Path) -> None:
    there = replace(CONFIG, dataset="npz:/home/a/cifar10.npz", output="/home/a/runs", threads=2, device="cpu")
    here = replace(CONFIG, dataset="npz:/data/cifar10.npz")
    store = Store(tmp_path / "runs.jsonl")
    store.add(there, 2, ROUNDS)
    assert store.find(here, 2) is not None
    assert "/home" not in store.path.read_text().replace(str(tmp_path), "")
    assert settings_of(here)["dataset"] == "npz:cifar10.npz"
    assert store.find(replace(here, dataset="cifar10"), 2) is None


def test_a_setting_that_is_newer_than_a_run_had_its_default_then(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs.jsonl")
    store.add(CONFIG, 2, ROUNDS)
    document = json.loads(store.path.read_text())
    del document["settings"]["sketch-size"]
    store.path.write_text(json.dumps(document) + "\n")
    assert Store(store.path).find(CONFIG, 2) is not None


@pytest.mark.parametrize("line", ["{", "[]", '{"settings": {}}', '{"rounds": {"test-accuracy": [1]}, "nodes": 2}'])
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "runs.jsonl"
    Store(path).add(CONFIG, 2, ROUNDS)
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=rf"{path}, line 2: not a run"):
        Store(path)


def test_what_is_missing_is_run_and_what_failed_is_kept(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs.jsonl")
    broken = replace(CONFIG, algorithm="fedavg", learning_rate=1e30, max_failed_rounds=1)
    good, failed = run_missing(store, [CONFIG, broken], 2, jobs=2)
    assert [row["clients"] for row in good.rounds] == [0, 2]
    assert good.rounds[1]["local-steps"] == 1
    assert good.rounds[0]["cpu-seconds"] == 0 < good.rounds[1]["cpu-seconds"]
    assert failed.failure.startswith("FailedRoundsError: round 1")
    lines = store.path.read_text()
    again = run_missing(Store(store.path), [broken, CONFIG], 2, jobs=2)
    assert [run.failure for run in again] == [failed.failure, ""]
    assert store.path.read_text() == lines


def test_a_run_that_is_killed_is_not_kept_as_failed(tmp_path: Path) -> None:
    def kill_it() -> None:
        while not (workers := multiprocessing.active_children()):
            time.sleep(0.05)
        for worker in workers:
            worker.kill()

    store = Store(tmp_path / "runs.jsonl")
    runs._warm_up()  # by a process that is none of a run
    killer = threading.Thread(target=kill_it)
    killer.start()
    with pytest.raises(RuntimeError, match="1 runs broke off; the same command runs them again"):
        run_missing(store, [CONFIG], 2, jobs=1)
    killer.join()
    assert not store.path.exists()


def test_what_is_imported_before_there_are_runs_is_there() -> None:
    """An import that fails is passed over there: it would only take longer."""
    assert all(importlib.util.find_spec(name) is not None for name in runs._IMPORTED)


def test_what_is_wrong_with_a_machine_is_not_kept_as_a_failed_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path / "runs.jsonl")
    lost = replace(CONFIG, dataset=f"npz:{tmp_path}/lost.npz")
    with pytest.raises(RuntimeError, match="1 runs broke off"):
        run_missing(store, [lost, CONFIG], 2, jobs=2)
    assert "lost.npz: there is no such file" in capsys.readouterr().out
    assert [run.settings["dataset"] for run in store.runs] == ["digits"], "the other one goes on"


def test_a_last_line_that_was_cut_short_does_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "runs.jsonl"
    for seed in (0, 1):
        Store(path).add(replace(CONFIG, seed=seed), 2, ROUNDS)
    whole = path.read_text()
    path.write_text(whole[:-30])
    store = Store(path)
    assert "the last line is cut short" in capsys.readouterr().err
    assert [run.settings["seed"] for run in store.runs] == [0]
    store.add(replace(CONFIG, seed=1), 2, ROUNDS)
    assert path.read_text() == whole


def test_a_file_that_is_full_is_gone_on_with_in_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "runs.jsonl"
    Store(path).add(CONFIG, 2, ROUNDS)
    limit = 5 * path.stat().st_size // 2  # of two runs, not three
    monkeypatch.setattr(runs, "_PART_BYTES", limit)
    for seed in range(1, 4):
        Store(path).add(replace(CONFIG, seed=seed), 2, ROUNDS)
    store = Store(path)
    for seed in (4, 0):  # the last one is again what the first was
        store.add(replace(CONFIG, seed=seed), 2, [*ROUNDS[:-1], {**ROUNDS[-1], "test-accuracy": 0.75}])

    parts = list(tmp_path.iterdir())
    assert {part.name for part in parts} == {"runs.jsonl", "runs.2.jsonl", "runs.3.jsonl"}
    assert all(part.stat().st_size <= limit for part in parts)
    again = Store(path)
    assert [run.settings["seed"] for run in again.runs] == [0, 1, 2, 3, 4, 0]
    newest = again.find(CONFIG, 2)
    assert newest is not None
    assert newest.rounds[-1]["test-accuracy"] == 0.75


def test_a_run_that_is_larger_than_a_file_may_be_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "_PART_BYTES", 10)
    for seed in range(2):
        Store(tmp_path / "runs.jsonl").add(replace(CONFIG, seed=seed), 2, ROUNDS)
    assert [run.settings["seed"] for run in Store(tmp_path / "runs.jsonl").runs] == [0, 1]
    assert {part.name for part in tmp_path.iterdir()} == {"runs.jsonl", "runs.2.jsonl"}


def test_the_command_that_is_kept_names_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [
        "x.py",
        "--data",
        "/srv/a/data",
        "--output=/home/me/x.json",
        "dataset=npz:/srv/a b/c.npz",
        "alpha=0.1",
    ]
    monkeypatch.setattr("sys.argv", [*given, "algorithms=fedavg:initial-model=/m/n.npz,fedpm", "runs/here"])
    command = provenance()["command"]
    assert command.startswith("--data data --output=x.json dataset=npz:c.npz alpha=0.1 ")
    assert command.endswith(" algorithms=fedavg:initial-model=n.npz,fedpm runs/here")


def test_without_git_no_commit_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    commit.cache_clear()
    assert commit() == "unknown"
    commit.cache_clear()


def test_the_commit_is_asked_for_before_there_are_figures() -> None:
    for name in ("benchmarks.step", "benchmarks.compare"):
        commit.cache_clear()
        with pytest.raises(SystemExit):
            importlib.import_module(name).main(["--help"])
        assert commit.cache_info().misses == 1


def test_rounds_to() -> None:
    assert rounds_to(ROUNDS, 0.12) == 1
    assert rounds_to(ROUNDS, 0.1) == 1, "the initial model does not count"
    assert rounds_to(ROUNDS, 0.5) is None
