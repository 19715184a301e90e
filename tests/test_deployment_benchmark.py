"""The benchmark of deployments: arguments and rows. Real federations are in tests/deployment."""

from pathlib import Path

import pytest

from benchmarks.deployment import METHODS, config_of, main, make_data, rows_of
from fedpm_flwr.tasks import load_dataset


def test_rows_are_compared_with_flowers_own() -> None:
    seconds = {method: [4.0 / (place + 1), 8.0 / (place + 1)] for place, method in enumerate(METHODS)}
    rows = rows_of(seconds, {**dict.fromkeys(METHODS, 2e6), METHODS[0]: None}, tls=True)
    assert [row["times_flwr"] for row in rows] == [1.0, 0.5, 0.3333, 0.25]
    assert (rows[0]["method"], rows[0]["strategy"], rows[0]["uplink_mb"]) == ("fedavg", "flwr", None)
    assert (rows[3]["round_seconds"], rows[3]["range_seconds"], rows[3]["uplink_mb"]) == (1.5, 1.0, 2.0)
    assert (rows[3]["codec"], rows[3]["tls"], rows[3]["packed_arrays"]) == ("auto", "true", "true")


def test_the_data_is_what_the_settings_name(tmp_path: Path) -> None:
    config = config_of(METHODS[3], "resnet18-gn", 2, 4, make_data(tmp_path), tmp_path / "run")
    split = load_dataset(config.dataset)
    assert (split.input_shape, split.classes) == ((3, 32, 32), 10)
    assert (config.codec, config.packed_arrays, config.local_steps) == ("auto", True, 1)


@pytest.mark.parametrize("arguments", [["--nodes", "0"], ["--rounds", "1"], ["--repeats", "0"]])
def test_arguments_that_make_no_sense(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert "--nodes, --rounds and --repeats are whole numbers; allowed: >= 1" in capsys.readouterr().err
