"""The benchmark of the codecs: bytes of real replies, and a table of real runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import wire
from benchmarks.panels import mark_of_panels, read_mark
from benchmarks.table import rounded


def rows_of(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    line = capsys.readouterr().out.splitlines()[-1]
    rows: list[dict[str, Any]] = json.loads(line.removeprefix("RESULT "))["rows"]
    return rows


def test_bytes_beside_fedavgs(capsys: pytest.CaptureFixture[str]) -> None:
    codecs = ["triangle-float32", "triangle-int8", "rank-8", "auto", "auto-0.02", "diagonal"]
    assert wire.main(["--models", "lenet", "--codecs", ",".join(codecs)]) == 0
    rows = rows_of(capsys)
    assert [(row["model"], row["codec"]) for row in rows] == [("lenet", codec) for codec in codecs]
    ratios = {row["codec"]: row["uplink_ratio"] for row in rows}
    assert 1.04 < ratios["auto"] <= 1.05
    assert ratios["auto-0.02"] <= 1.02
    # All of a LeNet's triangles: Σ c(c + 1)/2 over c = 76, 151, 401, 121, 85 inputs, biases in.
    triangles = 4 * sum(c * (c + 1) / 2 for c in (76, 151, 401, 121, 85))
    assert ratios["triangle-float32"] == pytest.approx(1 + triangles / (4 * 62006), abs=0.01)


def test_a_table_of_real_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(60) % 10
    data, picture = tmp_path / "cifar10.npz", tmp_path / "wire.png"
    np.savez(data, x_train=images, y_train=labels, x_test=images[:20], y_test=labels[:20])
    given = ["--data", str(data), "--codecs", "auto", "--seeds", "2", "--rounds", "1", "--plot", str(picture)]
    assert wire.main([*given, "--output", str(tmp_path / "wire.json")]) == 0
    full, auto, averaged, first_order = rows_of(capsys)
    assert (full["codec"], auto["codec"], averaged["method"]) == ("triangle-float32", "auto", "localnewton")
    assert first_order["method"] == "fedavg"
    assert full["minus_full"] == 0.0
    assert full["uplink_mb"] > 2 * auto["uplink_mb"] > 2 * averaged["uplink_mb"]
    assert auto["uplink_mb"] < 1.06 * averaged["uplink_mb"]
    curves = json.loads((tmp_path / "wire.json").read_text())["curves"]
    assert read_mark(picture) == mark_of_panels(curves), "what is drawn is what is kept"
    lasts = {label: rounded(accuracies[-1]) for label, (_, accuracies) in curves[0]["lines"].items()}
    assert lasts == {
        "triangle-float32": full["accuracy"],
        "auto": auto["accuracy"],
        "localnewton": averaged["accuracy"],
        "fedavg": first_order["accuracy"],
    }


def test_seeds_that_failed_are_told() -> None:
    row = wire.trained("auto-0.02", [[{"test-accuracy": 0.5}]], None, {"uplink_ratio": 1.02}, seeds=3)
    assert (row["codec"], row["failed"], row["accuracy"]) == ("auto-0.02", 2, None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--codecs", "zip"], "unknown codec 'zip'; allowed: "),
        (["--models", "vgg"], "model='vgg' is not allowed"),
        (["--seeds", "0"], "--seeds=0 is not allowed; allowed: >= 1"),
        (["--data", "/nowhere.npz"], "--data=/nowhere.npz: there is no such file"),
    ],
)
def test_bad_arguments_are_named(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        wire.main(given)
    assert message in capsys.readouterr().err
