"""What a run leaves behind."""

import csv
import errno
import json
import math
import os
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedpm_flwr.config import Config, ConfigError
from fedpm_flwr.report import RunReport, one_line, output_folder, seconds_left, spread


def test_everything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Config(output=str(tmp_path / "deep" / "run"), num_server_rounds=2)
    report = RunReport(config, output_folder(config))
    for server_round, accuracy in enumerate((0.1, 0.9, 0.8)):
        tested = {"test-accuracy": accuracy, "test-loss": 1.0, "clients": 3, "round": 99}
        tested["uplink-bytes"] = 2_000_000 * bool(server_round)
        report.add_round(server_round, tested | ({"train-loss": 0.5} if server_round else {}))
    weight = torch.arange(6.0).reshape(2, 3).T
    state = {"w": weight, "tied": weight}
    report.finish(state)

    folder = report.folder
    rows = json.loads((folder / "metrics.json").read_text())
    assert [row["round"] for row in rows] == [0, 1, 2]
    with (folder / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["test-accuracy"]) for row in table] == [0.1, 0.9, 0.8]
    assert [row["train-loss"] for row in table] == ["", "0.5", "0.5"]
    assert Config.from_run_config(tomllib.loads((folder / "config.toml").read_text())) == config
    assert torch.equal(load_file(folder / "model.safetensors")["w"], state["w"])
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("fedpm | ") for line in lines)
    assert "round 1/2  accuracy 0.9000  loss 1.0000  clients 3  uplink 2.00 MB" in lines[2]
    assert "test accuracy 0.8000 (best 0.9000 in round 1), uplink 4.0 MB" in lines[5]


def test_rounds_are_on_disk_while_the_run_goes_on(tmp_path: Path) -> None:
    report = RunReport(Config(), tmp_path)
    report.add_round(0, {"test-accuracy": 0.5, "test-loss": 1.0, "clients": 0, "uplink-bytes": 0})
    assert len(json.loads((tmp_path / "metrics.json").read_text())) == 1


def test_a_disk_that_is_full_for_a_while_costs_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = RunReport(Config(), tmp_path)
    row = {"test-accuracy": 0.5, "test-loss": 1.0, "clients": 0, "uplink-bytes": 0}
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full_disk)
        report.add_round(0, row)
    assert "round 0: metrics could not be written, the run goes on: [Errno 28]" in capsys.readouterr().out
    report.add_round(1, row)
    assert [one["round"] for one in json.loads((tmp_path / "metrics.json").read_text())] == [0, 1]


def test_a_model_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = RunReport(Config(), tmp_path)
    report.add_round(0, {"test-accuracy": 0.5, "test-loss": 1.0, "clients": 0, "uplink-bytes": 0})
    report.keep({"w": torch.zeros(2)}, 0)
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full_disk)
        report.keep({"w": torch.ones(2)}, 1)
        with pytest.raises(OSError, match="No space left"):
            report.finish({"w": torch.ones(2)})
    report.close()
    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], torch.zeros(2))
    said = capsys.readouterr().out
    assert "round 1: the model could not be written, the run goes on: [Errno 28]" in said
    assert "the model of round 0 is in" in said


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_metrics_for_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report = RunReport(Config(tensorboard=True), tmp_path)
    for number in range(3):
        report.add_round(number, {"test-accuracy": number / 4, "test-loss": 1.0, "clients": 0, "uplink-bytes": 0})
    reader = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert "round" not in reader.Tags()["scalars"]
    assert [(one.step, one.value) for one in reader.Scalars("test-accuracy")] == [(0, 0.0), (1, 0.25), (2, 0.5)]


def test_without_tensorboard_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    with pytest.raises(ConfigError, match=r"tensorboard=true is not usable here: .*pip install tensorboard"):
        RunReport(Config(tensorboard=True), tmp_path)


def test_a_loss_that_is_not_finite_is_null_in_json(tmp_path: Path) -> None:
    report = RunReport(Config(), tmp_path)
    report.add_round(0, {"test-accuracy": 0.5, "test-loss": float("nan"), "clients": 0, "uplink-bytes": 0})
    assert "NaN" not in (tmp_path / "metrics.json").read_text()
    assert json.loads((tmp_path / "metrics.json").read_text())[0]["test-loss"] is None


def test_the_default_folder_is_named_after_time_and_algorithm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = output_folder(Config(algorithm="fedavg"))
    assert folder.parent == tmp_path / "runs"
    assert folder.name.endswith("-fedavg")


def test_another_runs_checkpoints_are_not_run_over(tmp_path: Path) -> None:
    """As a run without checkpoints of its own would, whose folder a later ``resume`` takes for one run's."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "round-1.safetensors.0123.part").touch()  # of a run that was killed in its first
    own = Config(output=str(tmp_path))
    assert output_folder(own) == tmp_path
    (tmp_path / "checkpoints" / "round-2.safetensors").touch()
    for resume in ("", str(tmp_path / "other")):
        with pytest.raises(ConfigError, match=r"^output='.*' holds checkpoints of a run: resume it, or begin an"):
            output_folder(replace(own, resume=resume))
    for config in (replace(own, resume=f"{tmp_path}/checkpoints/.."), Config(resume=str(tmp_path))):
        assert output_folder(config).resolve() == tmp_path.resolve()


def test_a_long_reason_keeps_its_beginning_and_its_end() -> None:
    assert one_line("a\nb\x00c") == "a b c"
    assert one_line("x" * 300) == "x" * 300
    traceback = (
        "<class 'ray.exceptions.RayTaskError(ClientAppException)'>:<'" + "\x1b[36mray::run()\x1b[39m\n" * 99
    )
    told = one_line(f"{traceback}Exception ClientAppException occurred. Message: FOOF takes the model'>")
    assert told.startswith("<class 'ray.exceptions.RayTaskError(ClientAppException)'>:<'ray::run() ray")
    assert told.endswith("Exception ClientAppException occurred. Message: FOOF takes the model'>")
    assert len(told) == 303
    assert told.isprintable()
    told = one_line("a" + "\x1b[0m" * 9_000_000 + "b")
    assert (told[0], told[-1], len(told) < 20) == ("a", "b", True)


def test_time_left_is_told_once_rounds_without_starting_up_are_there() -> None:
    rows: list[dict[str, int | float]] = [{"round": i, "seconds": s} for i, s in enumerate((9.0, 30.0, 2.0, 4.0))]
    assert seconds_left(rows[:2], 10) is None
    assert seconds_left(rows, 10) == pytest.approx(7 * 3.0)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)])
def test_the_spread_of_clients_ranks_nan_as_worst(order: tuple[int, ...]) -> None:
    values = [(0.5, 0.7, 0.9, float("nan"))[i] for i in order]
    for best, first, middle in ((max, 0.9, 0.6), (min, 0.5, 0.8)):
        found = spread("x", values, best)
        assert found["x-best"] == first
        assert found["x-median"] == pytest.approx(middle)
        assert math.isnan(found["x-worst"])
    assert spread("x", [0.5, 0.9, 0.7], max) == {"x-worst": 0.5, "x-median": 0.7, "x-best": 0.9}
    assert spread("x", [], max) == {}


def test_the_model_is_as_readable_as_other_files(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        report = RunReport(Config(), tmp_path)
        report.keep({"w": torch.zeros(2)}, 1)
    finally:
        os.umask(before)
    assert {path.name for path in tmp_path.iterdir()} == {"config.toml", "model.safetensors"}
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o640
