"""The server's benchmark on few clients: real processes, and a table whose figures hang together."""

import json
from pathlib import Path

import pytest

from benchmarks.server import main


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "server.json"
    assert main(["--clients", "8,24", "--methods", "fedpm:auto,fedavg", "--output", str(output)]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    document = json.loads(last.removeprefix("RESULT "))
    assert document == json.loads(output.read_text())
    rows = document["rows"]
    assert [(row["method"], row["codec"], row["clients"]) for row in rows] == [
        ("fedpm", "auto", 8),
        ("fedpm", "auto", 24),
        ("fedavg", None, 8),
        ("fedavg", None, 24),
    ]
    for row in rows:
        assert row["floor_seconds"] > 0
        assert row["times_floor"] == pytest.approx(row["seconds"] / row["floor_seconds"], rel=1e-2)
    # Sixteen more replies of 10 MB each: in a list, or one after another.
    assert rows[3]["peak_mb"] - rows[2]["peak_mb"] > 120
    assert rows[1]["peak_mb"] - rows[0]["peak_mb"] < 120
    assert rows[2]["times_fedavg"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "fedsgd"], "--methods=fedsgd; allowed, joined by commas: fedpm, fedpm:CODEC, fedavg"),
        (["--methods", "fedpm:zip"], "unknown codec 'zip'; allowed: triangle-float64"),
        (["--clients", "0"], "--clients and --threads are whole numbers; allowed: >= 1"),
        (["--clients", "ten"], "--clients and --threads are whole numbers; allowed: >= 1"),
    ],
)
def test_arguments_that_make_no_sense(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
