"""The convex benchmark: its optimum and step length against oracles, its table from a real run."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import dump_svmlight_file, load_breast_cancer

from benchmarks import convex
from benchmarks.panels import mark_of_panels, read_mark
from benchmarks.table import rounded
from fedpm_flwr.config import Config
from fedpm_flwr.objective import Objective
from fedpm_flwr.tasks import build_model, client_data, load_dataset
from fedpm_flwr.training import loader


@pytest.fixture
def problem(tmp_path: Path) -> Config:
    return convex.prepare("breast-cancer", None, tmp_path / "problem")


def test_the_optimum_is_one(problem: Config) -> None:
    """No gradient, and more loss in every direction."""
    train = load_dataset("breast-cancer").train
    model = convex.optimum(problem)
    objective = Objective(model, [(train.inputs.double(), train.labels)], F.cross_entropy, problem.weight_decay)
    assert objective.gradient().norm() < 1e-14
    best, theta = objective.value(), objective.theta
    for direction in torch.eye(len(theta), dtype=torch.float64)[:5]:
        objective.move_to(theta + 1e-3 * direction)
        assert objective.value() > best


def test_first_order_methods_step_by_the_largest_curvature(problem: Config) -> None:
    """At θ = 0 the Hessian of the logistic loss is XᵀX / 4n, its largest anywhere."""
    largest = 0.0
    for partition in range(10):
        (batch,) = loader(client_data(problem, partition, 10), 0)
        model = build_model("logistic", (30,), 2, 0).double()
        matrix = Objective(model, [batch], F.cross_entropy, problem.weight_decay).hessian()
        largest = max(largest, float(torch.linalg.eigvalsh(matrix)[-1]))
    assert convex.largest_curvature(problem) == pytest.approx(largest, rel=1e-9)
    assert convex.configure(problem, "fedavg", 1).learning_rate == pytest.approx(1 / largest)


def test_a_table_of_a_few_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, picture = tmp_path / "convex.json", tmp_path / "convex.png"
    methods = "fedpm:1,fedpm-corrected:3,localnewton:1"
    status = convex.main(
        ["--methods", methods, "--rounds", "12", "--jobs", "2", "--output", str(output), "--plot", str(picture)]
    )
    assert status == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("RESULT ")
    rows = json.loads(line.removeprefix("RESULT "))["rows"]
    kept = json.loads(output.read_text())
    assert kept["rows"] == rows
    (panel,) = kept["curves"]
    assert list(panel["lines"]) == ["fedpm K=1", "fedpm-corrected K=3", "localnewton K=1"]
    for row, (steps, distances) in zip(rows, panel["lines"].values(), strict=True):
        assert steps == list(range(13))
        assert (rounded(min(distances[1:])), rounded(distances[-1])) == (row["floor"], row["last"])
    assert read_mark(picture) == mark_of_panels(kept["curves"]), "what is drawn is what is kept"
    newton, corrected, averaged = rows
    keys = {"dataset", "method", "local_steps", "rounds_to_1e-3", "rounds_to_1e-6", "rounds_to_1e-10"}
    assert keys | {"floor", "uplink_mb", "seconds"} <= set(newton)
    assert [(row["method"], row["local_steps"]) for row in rows] == [
        ("fedpm", 1),
        ("fedpm-corrected", 3),
        ("localnewton", 1),
    ]
    for row in (newton, corrected):
        assert row["rounds_to_1e-3"] <= row["rounds_to_1e-6"] <= row["rounds_to_1e-10"] <= 12
        assert row["floor"] < 1e-12
        assert row["order"] > 1.3
    assert averaged["floor"] > 0.1
    assert averaged["rounds_to_1e-3"] is None
    assert 0.01 < averaged["uplink_mb"] < newton["uplink_mb"] < corrected["uplink_mb"]


def test_a_file_is_trained_on_whole(tmp_path: Path) -> None:
    features, labels = load_breast_cancer(return_X_y=True)
    dump_svmlight_file(features[:40, :3] / 100, labels[:40], str(tmp_path / "a9a"))
    config = convex.prepare("a9a", tmp_path, tmp_path / "problem")
    split = load_dataset(config.dataset)
    assert len(split.train) == len(split.test) == 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--datasets", "mnist"], "--datasets=mnist; allowed, joined by commas: a9a, w8a, breast-cancer"),
        (["--methods", "fedpm"], "--methods=fedpm; allowed, joined by commas: NAME:K, of fedpm,"),
        (["--methods", "sgd:1"], "--methods=sgd:1; allowed"),
        (["--methods", "fedpm:0"], "--methods=fedpm:0; allowed"),
        (["--data", "/nowhere"], "--data=/nowhere: there is no file a9a in it"),
        (["--rounds", "0"], "--rounds=0 is not allowed; allowed: >= 1"),
        (["--participation", "0"], "--participation=0.0 is not allowed; allowed: > 0 and <= 1"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        convex.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.faults
def test_the_same_in_flowers_simulation(tmp_path: Path) -> None:
    """Real Ray, a real SuperLink: after two rounds the model is as far from the optimum as in this process."""
    lasts = []
    for backend in ("inline", "ray"):
        output = tmp_path / f"{backend}.json"
        given = ["--methods", "fedpm:1", "--rounds", "2", "--backend", backend, "--output", str(output)]
        assert convex.main(given) == 0
        (row,) = json.loads(output.read_text())["rows"]
        lasts.append(row["last"])
    assert lasts[0] == pytest.approx(lasts[1], rel=1e-9)
