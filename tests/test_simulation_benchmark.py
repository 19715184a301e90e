"""The simulation's benchmark: arguments, data, rows, and its smallest version on Ray."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import simulation
from benchmarks.runs import Rounds
from benchmarks.simulation import config_of, main, make_data, measure, row_of


def test_every_client_has_examples(tmp_path: Path) -> None:
    data = np.load(make_data(tmp_path))
    assert data["x_train"].shape == (20_000, 64)
    assert set(data["y_train"]) == set(range(10))
    config = config_of("fedpm:auto", 1000, 5, tmp_path / "digits.npz", tmp_path / "out")
    assert (config.algorithm, config.codec, config.min_available_nodes) == ("fedpm", "auto", 1000)


def test_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From runs of 3 rounds, of which the first is told apart."""
    rounds: Rounds = [
        {"round": i, "seconds": seconds, "test-accuracy": 0.5} for i, seconds in enumerate([5, 9, 2, 4])
    ]
    monkeypatch.setattr(simulation, "run_on_ray", lambda configs, nodes: {c.output: rounds for c in configs})
    config = config_of("fedpm", 6, 3, make_data(tmp_path), tmp_path / "run")
    run = measure(config, 6)
    assert (run["first_round"], run["round_seconds"]) == (9, 3)
    # The test of the initial model is part of the start.
    assert run["start_seconds"] == pytest.approx(run["seconds"] - 15, abs=0.01)
    row = row_of(config, [{"seconds": seconds} for seconds in (40.0, 30.0, 31.0)], 6)
    assert (row["clients"], row["method"], row["codec"]) == (6, "fedpm", "triangle-float32")
    assert (row["seconds"], row["range_seconds"]) == (31, 10)
    assert isinstance(row["work_seconds"], float)
    assert 0 < row["work_seconds"] < 60


def test_the_smallest_version_on_ray(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--clients", "2", "--methods", "fedpm", "--rounds", "2", "--repeats", "1"]) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("RESULT "))["rows"]
    assert (row["clients"], row["method"], row["codec"], row["times_fedavg"]) == (
        2,
        "fedpm",
        "triangle-float32",
        None,
    )
    parts = ("start_seconds", "first_round", "round_seconds")
    assert all(row[part] > 0 for part in (*parts, "work_seconds"))
    assert row["seconds"] == pytest.approx(sum(row[part] for part in parts), rel=0.002)
    assert row["range_seconds"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "fedsgd"], "algorithm='fedsgd' is not allowed"),
        (["--methods", "fedpm:zip"], "unknown codec 'zip'"),
        (["--clients", "ten"], "--clients, --rounds and --repeats are whole numbers; allowed: >= 1"),
        (["--rounds", "1"], "--clients, --rounds and --repeats are whole numbers; allowed: >= 1, but >= 2 rounds"),
        (["--repeats", "0"], "--clients, --rounds and --repeats are whole numbers; allowed: >= 1"),
    ],
)
def test_arguments_that_make_no_sense(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
