"""The benchmark of deployments: arguments, rows, and its smallest version over gRPC."""

import json
from pathlib import Path

import pytest

from benchmarks.deployment import METHODS, config_of, main, make_data, rows_of
from fedpm_flwr.tasks import load_dataset


@pytest.mark.parametrize(("option", "allowed"), [("--methods", "fedavg, fedpm"), ("--tls", "false, true")])
def test_names_that_are_not_known(option: str, allowed: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([option, "other"])
    assert f"{option}=other; allowed, joined by commas: {allowed}" in capsys.readouterr().err


def test_rows_are_compared_with_flowers_own() -> None:
    seconds = {method: [4.0 / (place + 1), 8.0 / (place + 1)] for place, method in enumerate(METHODS)}
    rows = rows_of(seconds, {**dict.fromkeys(METHODS, 2e6), METHODS[0]: None}, "true")
    assert [row["times_flwr"] for row in rows] == [1.0, 0.5, 0.3333, 0.25]
    assert (rows[0]["method"], rows[0]["strategy"], rows[0]["uplink_mb"]) == ("fedavg", "flwr", None)
    assert (rows[3]["round_seconds"], rows[3]["range_seconds"], rows[3]["uplink_mb"]) == (1.5, 1.0, 2.0)
    assert (rows[3]["codec"], rows[3]["tls"], rows[3]["packed_arrays"]) == ("auto", "true", "true")


def test_the_data_is_what_the_settings_name(tmp_path: Path) -> None:
    config = config_of(METHODS[3], "resnet18-gn", 2, 4, make_data(tmp_path), tmp_path / "run")
    split = load_dataset(config.dataset)
    assert (split.input_shape, split.classes) == ((3, 32, 32), 10)
    assert (config.codec, config.packed_arrays, config.local_steps) == ("auto", True, 1)


def test_the_smallest_version_over_grpc(capsys: pytest.CaptureFixture[str]) -> None:
    small = "--model linear --methods fedpm --tls false --nodes 1 --rounds 2 --repeats 1"
    assert main(small.split()) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("RESULT "))
    assert (result["benchmark"], result["model"], result["nodes"]) == ("deployment", "linear", 1)
    flowers_own, fedpm = result["rows"]
    assert (flowers_own["method"], flowers_own["strategy"], flowers_own["codec"]) == ("fedavg", "flwr", None)
    assert (fedpm["method"], fedpm["strategy"], fedpm["codec"]) == ("fedpm", "fedpm_flwr", "auto")
    for row in (flowers_own, fedpm):
        assert row["tls"] == "false"
        assert row["round_seconds"] > 0 == row["range_seconds"]
        assert row["times_flwr"] == pytest.approx(row["round_seconds"] / flowers_own["round_seconds"], rel=2e-3)
    megabytes_of_a_model = 4 * (3 * 32 * 32 + 1) * 10 / 1e6
    assert flowers_own["uplink_mb"] is None
    assert megabytes_of_a_model < fedpm["uplink_mb"] < 1.06 * megabytes_of_a_model


@pytest.mark.parametrize("arguments", [["--nodes", "0"], ["--rounds", "1"], ["--repeats", "0"]])
def test_numbers_that_make_no_sense(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert "--nodes, --rounds and --repeats are whole numbers; allowed: >= 1" in capsys.readouterr().err
