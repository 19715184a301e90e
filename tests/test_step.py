"""The benchmark of a step: its rows, its average, what it refuses."""

import json
from pathlib import Path

import pytest

from benchmarks.step import main


def test_a_row_for_each_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "step.json"
    small = ["--devices", "cpu", "--models", "lenet", "--batch-size", "4", "--repeats", "1", "--threads", "1"]
    methods = ["foof", "kfac", "sophia"]
    assert (
        main([*small, "--refresh", "4", "--inverse", "8", "--methods", ",".join(methods), f"--output={output}"])
        == 0
    )
    out = capsys.readouterr().out.splitlines()
    assert out[-1].startswith("RESULT ")
    document = json.loads(out[-1].removeprefix("RESULT "))
    assert document == json.loads(output.read_text())
    rows = document["rows"]
    assert [(row["device"], row["model"], row["method"]) for row in rows] == [
        ("cpu", "lenet", method) for method in ["sgd", *methods]
    ]
    assert "0.75 plain + 0.125 refresh + 0.125 inverting" in out[-2]
    for row in rows:
        kinds = [row["plain_ms"], row["refresh_ms"], row["inverting_ms"]]
        mean = sum(share * kind for share, kind in zip((0.75, 0.125, 0.125), kinds, strict=True))
        assert row["step_ms"] == pytest.approx(mean, rel=1e-2)
        assert row["step_ratio"] == pytest.approx(row["step_ms"] / rows[0]["step_ms"], rel=1e-2)
        assert row["spread"] == 0.0
        assert row["least_ratio"] > 0.0
        assert row["peak_mb"] > 0.0
    sgd, foof = rows[:2]
    assert foof["inverting_ms"] > sgd["inverting_ms"]
    assert foof["peak_mb"] > sgd["peak_mb"]


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--methods=sgd,fof", "--methods=sgd,fof; allowed, joined by commas: sgd, adam, foof"),
        ("--models=alexnet", "allowed, joined by commas: cnn, linear, mlp, lenet"),
        ("--repeats=0", "--repeats=0 is not allowed"),
        ("--inverse=15", "--inverse=15 is not a multiple of --refresh=10"),
    ],
)
def test_what_cannot_be_measured_is_refused(argument: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([argument])
    assert said in capsys.readouterr().err
