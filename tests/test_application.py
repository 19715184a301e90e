"""The two root files, through the inline Grid."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

import client_app
import server_app
from fedpm_flwr import messages
from fedpm_flwr.config import ALGORITHMS, Config
from fedpm_flwr.inline import run_inline

Settings = Mapping[str, object]


def run(folder: Path, changes: Settings, nodes: int = 3) -> list[dict[str, float]]:
    settings = {"num-server-rounds": 2, "output": str(folder), **changes}
    run_inline(server_app.app, client_app.app, nodes, Config.from_run_config(settings).to_run_config())
    rows: list[dict[str, float]] = json.loads((folder / "metrics.json").read_text())
    return rows


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_learns(algorithm: str, tmp_path: Path) -> None:
    rate = 0.3 if algorithm == "fedavg" else 0.1
    settings = {"algorithm": algorithm, "num-server-rounds": 3, "alpha": 10.0, "learning-rate": rate}
    rows = run(tmp_path, settings)
    assert [row["round"] for row in rows] == [0, 1, 2, 3]
    assert all(row["clients"] == 3 for row in rows[1:])
    assert rows[-1]["test-loss"] < rows[0]["test-loss"] - 0.05


def test_uplink_counts_models_and_curvature(tmp_path: Path) -> None:
    averaged = run(tmp_path / "a", {"algorithm": "localnewton"})[1]["uplink-bytes"]
    mixed = run(tmp_path / "b", {"algorithm": "fedpm"})[1]["uplink-bytes"]
    double = run(tmp_path / "c", {"codec": "triangle-float64"})[1]["uplink-bytes"]
    sides = (1 * 9 + 1, 16 * 9 + 1, 32 * 4 + 1, 64 + 1)
    triangles = 3 * sum(side * (side + 1) // 2 for side in sides)
    assert double - mixed == pytest.approx(4 * triangles, abs=64)
    assert mixed - averaged == pytest.approx(4 * triangles, rel=0.05)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [({"local-steps": 3}, 3), ({"local-steps": 1}, 1), ({"local-epochs": 4, "batch-size": 0}, 4)],
)
def test_local_steps(changes: Settings, steps: int, tmp_path: Path) -> None:
    assert run(tmp_path, changes)[1]["local-steps"] == pytest.approx(steps)


def test_partial_participation_and_evaluation_on_clients(tmp_path: Path) -> None:
    rows = run(tmp_path, {"fraction-train": 0.5, "fraction-evaluate": 1.0}, nodes=4)
    assert [row["clients"] for row in rows] == [0, 2, 2]


def test_the_same_seed_gives_the_same_numbers(tmp_path: Path) -> None:
    def numbers(name: str, seed: int) -> list[tuple[float, float]]:
        return [(row["test-accuracy"], row["test-loss"]) for row in run(tmp_path / name, {"seed": seed})]

    first = numbers("a", 1)
    assert numbers("b", 1) == first
    assert numbers("c", 2) != first


def test_a_wrong_setting_reaches_the_user(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device='toaster' is not usable here"):
        run(tmp_path, {"device": "toaster"})


@pytest.mark.parametrize(
    "node_config",
    [
        {},
        {"partition-id": 1},
        {"partition-id": "1", "num-partitions": 2},
        {"partition-id": 2, "num-partitions": 2},
    ],
)
def test_a_node_without_a_partition_says_what_it_lacks(node_config: dict[str, str | int]) -> None:
    context = Context(1, 2, {**node_config}, RecordDict(), {})
    with pytest.raises(ValueError, match="the node config must name partition-id and num-partitions"):
        messages.partition_of(context)


def test_many_clients_of_few_examples_train(tmp_path: Path) -> None:
    rows = run(tmp_path, {"num-server-rounds": 1, "local-steps": 1}, nodes=60)
    assert rows[1]["clients"] == 60


def test_a_run_in_which_nobody_trains_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no round had a usable reply"):
        run(tmp_path, {"num-server-rounds": 1, "damping": 0.0, "refresh-interval": 1})
    assert (tmp_path / "metrics.json").exists()
