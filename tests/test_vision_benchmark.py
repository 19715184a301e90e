"""The benchmarks of the paper's table, in their smallest versions, end to end."""

import json
import math
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import flwr
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from benchmarks import ablation, panels, results, tune, vision
from benchmarks.experiments import ALGORITHMS, CONFIGS, METHODS, PAPER, RESULTS, Version, tuned
from benchmarks.panels import Line, Panel
from benchmarks.runs import Run, Store, settings_of, trial_accuracy
from benchmarks.table import publish
from benchmarks.vision import VERSIONS, Case, cases_of, pick_version
from fedpm_flwr.algorithms import settings_without_effect
from fedpm_flwr.config import Config

COLUMNS = {
    "dataset",
    "alpha",
    "method",
    "codec",
    "accuracy_mean",
    "accuracy_std",
    "rounds_to_fedavg",
    "uplink_mb",
    "seconds",
}


def write_data(folder: Path, name: str, classes: int) -> None:
    """Made-up images of CIFAR's shape, whose first pixels tell the class."""
    labels = np.arange(200) % classes
    images = np.random.default_rng(0).integers(0, 256, (200, 32, 32, 3), dtype=np.uint8)
    images[:, :16] = (labels * 255 // classes)[:, None, None, None]
    np.savez(folder / f"{name}.npz", x_train=images, y_train=labels, x_test=images[:50], y_test=labels[:50])


def rows_of(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    line = capsys.readouterr().out.splitlines()[-1]
    rows: list[dict[str, Any]] = json.loads(line.removeprefix("RESULT "))["rows"]
    return rows


def test_a_small_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_data(tmp_path, "cifar10", 10)
    store = tmp_path / "vision.jsonl"
    given = ["--data", str(tmp_path), "--alphas", "0.1", "--methods", "fedavg,fedpm:auto", "--seeds", "1"]
    given += ["--rounds", "2", "--store", str(store)]
    assert vision.main([*given, "--output", str(tmp_path / "table.json")]) == 0
    fedavg, fedpm = rows_of(capsys)
    assert json.loads((tmp_path / "table.json").read_text())["rows"] == [fedavg, fedpm]
    assert fedpm.keys() == fedavg.keys() >= COLUMNS
    assert (fedavg["method"], fedavg["codec"], fedavg["paper"]) == ("fedavg", None, 0.631)
    assert (fedpm["method"], fedpm["codec"], fedpm["paper"]) == ("fedpm", "auto", None)
    assert (fedpm["dataset"], fedpm["alpha"], fedpm["rounds"], fedpm["local_epochs"]) == ("cifar10", 0.1, 2, 5)
    assert fedavg["at_fedavgs_mb"] == fedavg["at_fedavgs_seconds"] == fedavg["accuracy_mean"]
    assert 1.04 < fedpm["uplink_mb"] / fedavg["uplink_mb"] < 1.06
    lines = store.read_text()
    assert vision.main(given) == 0, "nothing is run again"
    assert store.read_text() == lines
    assert rows_of(capsys) == [fedavg, fedpm]


def test_a_small_sweep_and_its_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_data(tmp_path, "cifar10", 10)
    given = ["--data", str(tmp_path), "--sweep", "epochs", "--rounds", "10", "--epochs", "1", "--seeds", "1"]
    given += ["--methods", "fedavg,fedavgm", "--store", str(tmp_path / "vision.jsonl")]
    assert vision.main(given) == 0
    rows = rows_of(capsys)
    assert all(row.keys() >= COLUMNS for row in rows)
    assert [(row["method"], row["rounds"], row["local_epochs"]) for row in rows] == [
        (method, rounds, 10 // rounds) for rounds in (1, 2, 10) for method in ("fedavg", "fedavgm")
    ]
    assert len({row["local_steps"] for row in rows}) == 1, "as many in all"
    assert [row["local_epochs"] for row in rows if row["paper"]] == [5, 5], "the paper has no others"
    runs = results.load(tmp_path)
    blocks = results.make_blocks(runs)
    assert blocks["vision"] == "", "a sweep's cases have no tables of their own"
    header, _, *lines = [line for line in blocks["sweeps"].splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, *lines)]
    assert cells[0] == ["method", "1 rounds × 10", "2 rounds × 5", "10 rounds × 1"]
    assert cells[1:] == [
        [f"`{method}`", *(f"{row['accuracy_mean']:.3f}" for row in rows if row["method"] == method)]
        for method in ("fedavg", "fedavgm")
    ]
    results.draw(runs, tmp_path / "images")
    (picture,) = (tmp_path / "images").iterdir()
    assert f"(images/{picture.name})" in blocks["sweeps"]
    assert picture.stat().st_size > 5_000
    assert results.make_blocks([run for run in runs if run.settings["num-server-rounds"] != 2])["sweeps"] == ""
    again = [replace(run, settings={**run.settings, "seed": 1}) for run in runs[:5]]
    assert results.make_blocks([*runs, *again])["sweeps"] == blocks["sweeps"], "only seeds that all have count"
    again = [replace(run, settings={**run.settings, "seed": 1}) for run in runs]
    broken = [*runs, replace(again[0], rounds=[], failure="not finite"), *again[1:]]
    assert runs[0].settings["algorithm"] == "fedavg"
    told = f"1 of 2 runs failed, the others {runs[0].rounds[-1]['test-accuracy']:.3f} |"
    assert results.make_blocks(broken)["sweeps"].count(told) == 1
    results.draw(broken, tmp_path / "again")
    one, two = (Image.open(folder / picture.name) for folder in (picture.parent, tmp_path / "again"))
    assert one.tobytes() == two.tobytes(), "of the run that did not"
    assert results.stale_pictures(broken, picture.parent) == [picture.name]


def test_a_budget_is_kept_by_the_smallest_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_data(tmp_path, "cifar10", 10)
    given = ["--data", str(tmp_path), "--alphas", "0.1", "--methods", "fedavg", "--seeds", "1"]
    given += ["--budget-minutes", "0.01", "--store", str(tmp_path / "s")]
    assert vision.main(given) == 0
    out = capsys.readouterr().out
    assert "cifar10: 200 training images and 2 rounds for all methods alike" in out
    assert "(the whole experiment: 50,000 images, 100 rounds)" in out
    (row,) = json.loads(out.splitlines()[-1].removeprefix("RESULT "))["rows"]
    assert (row["images"], row["rounds"], row["local_epochs"]) == (200, 2, 5)


def test_an_ablation_changes_one_thing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ablation.config_of("cifar10", ablation.UNCHANGED, Version(), 110)
    for name, changed in ablation.VARIANTS.items():
        config = ablation.config_of("cifar10", name, Version(), 110)
        assert settings_without_effect(replace(config, optimizer="foof")) == []
        before, after = base.to_run_config(), config.to_run_config()
        assert {key for key in after if after[key] != before[key]} == set(changed), name
        assert (config.validation_share, config.seed) == (0.2, 110)
    few = (ablation.UNCHANGED, "clients weigh alike")
    monkeypatch.setattr(ablation, "VARIANTS", {name: ablation.VARIANTS[name] for name in few})
    write_data(tmp_path, "cifar10", 10)
    given = ["--data", str(tmp_path), "--seeds", "1", "--images", "150", "--rounds", "2"]
    given += ["--store", str(tmp_path / "ablation-cifar10.jsonl")]
    assert ablation.main(given) == 0
    unchanged, alike = rows_of(capsys)
    assert (unchanged["variant"], unchanged["settings"], unchanged["minus_base_mean"]) == (few[0], None, 0.0)
    assert (alike["variant"], alike["settings"]) == (few[1], "weighting=uniform")
    kept = sorted(results.load_ablation(tmp_path), key=lambda run: str(run.settings["weighting"]))
    assert [ablation.variant_of(run) for run in kept] == list(few)
    one, other = (trial_accuracy(run) for run in kept)
    assert alike["minus_base_mean"] == pytest.approx(100 * (other - one), abs=0.01)
    assert "| clients weigh alike | `weighting=uniform` |" in results.make_blocks([], kept)["ablation"]
    # A run without the unchanged one by the same seed has nothing to be compared with.
    stray = replace(kept[1], settings={**kept[1].settings, "seed": 111})
    assert ablation.rows_of([*kept, stray]) == [unchanged, alike]
    # Nor is one of another size compared with these.
    larger = replace(kept[0], settings={**kept[0].settings, "max-train-examples": 200})
    assert ablation.rows_of([*kept, larger])[:2] == [unchanged, alike]
    assert ablation.rows_of([kept[1], larger]) == ablation.rows_of([larger])
    assert ablation.variant_of(replace(kept[0], settings={**kept[0].settings, "dataset": "digits"})) is None


def test_cifar100_is_resnet18_with_a_hundred_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data(tmp_path, "cifar100", 100)
    config = Case("cifar100", 1.0, Version(20, 1, 1)).config("fedpm", 0, tmp_path)
    assert (config.model, config.augment, config.dataset) == ("resnet18-gn", True, f"npz:{tmp_path}/cifar100.npz")
    given = ["--data", str(tmp_path), "--datasets", "cifar100", "--alphas", "1.0", "--methods", "fedavg"]
    given += ["--images", "20", "--rounds", "1", "--epochs", "1", "--seeds", "1", "--store", str(tmp_path / "s")]
    # Two clients, not ten: each costs a model of 45 MB there and back.
    monkeypatch.setattr(vision, "cases_of", lambda *one: [replace(case, nodes=2) for case in cases_of(*one)])
    assert vision.main(given) == 0
    (row,) = rows_of(capsys)
    assert (row["dataset"], row["paper"], row["images"]) == ("cifar100", None, 20)
    assert row["uplink_mb"] == pytest.approx(2 * 4 * 11.22, rel=0.02), "11.2 million parameters of 2 clients"


def test_a_search_writes_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_data(tmp_path, "cifar10", 10)
    given = ["--data", str(tmp_path), "--methods", "fedavg", "--trials", "2", "--images", "150", "--rounds", "1"]
    given += ["--finalists", "2", "--more-seeds", "1"]
    given += ["--store", str(tmp_path / "s.jsonl"), "--configs", str(tmp_path / "configs")]
    assert tune.main(given) == 0
    (row,) = rows_of(capsys)
    *runs, alike, alike_too = Store(tmp_path / "s.jsonl").runs
    assert [run.settings["seed"] for run in runs] == [100, 100, 101, 101]
    values = {(run.settings["learning-rate"], run.settings["seed"]): trial_accuracy(run) for run in runs}
    means = {rate: (values[rate, 100] + values[rate, 101]) / 2 for rate, _ in values}
    assert len(means) == 2
    assert means[row["learning-rate"]] == max(means.values()), "the best mean over seeds wins"
    for number, run in enumerate((alike, alike_too)):
        assert (run.settings["weighting"], run.settings["seed"]) == ("uniform", 100 + number)
        assert run.settings["learning-rate"] == row["learning-rate"], "the winner's"
    mean_alike = (trial_accuracy(alike) + trial_accuracy(alike_too)) / 2
    assert row["accuracy"] == pytest.approx(max(*means.values(), mean_alike), abs=1e-4)
    assert row["weighting"] == ("uniform" if mean_alike > max(means.values()) else "num-examples")
    assert (row["trials"], row["failed"]) == (2, 0)
    assert (row["first"], row["best"]) == (values[0.1, 100], max(values[rate, 100] for rate in means))
    assert all(run.settings["validation-share"] == 0.2 for run in runs)
    text = (tmp_path / "configs" / "cifar10-fedavg.toml").read_text()
    assert text.startswith(f"# Expected: accuracy {row['accuracy']:.3f} on held-out training images")
    assert "(150 images, 1 rounds, seeds 100 to 101;" in text
    written = Config.from_run_config(tomllib.loads(text))
    assert (written.learning_rate, written.momentum) == (row["learning-rate"], row["momentum"])
    assert written.weighting == row["weighting"]
    assert (written.dataset, written.num_server_rounds, written.validation_share) == ("cifar10", 100, 0.0)
    lines = (tmp_path / "s.jsonl").read_text()
    assert tune.main(given) == 0
    assert (tmp_path / "s.jsonl").read_text() == lines, "the same search finds its trials"
    # One that an earlier search has left is a finalist; those of others are not.
    store = Store(tmp_path / "s.jsonl")
    like = tune.config_of(tune._parse(given), "cifar10", "fedavg", {})

    def rounds(accuracy: float) -> list[dict[str, float]]:
        return [{"round": 0, "test-accuracy": 0.1}, {"round": 1, "test-accuracy": accuracy}]

    earlier = replace(like, learning_rate=2.5, clip=7.0)
    store.add(earlier, 10, rounds(0.99))
    store.add(replace(earlier, seed=101), 10, rounds(0.89))
    for other in (replace(like, seed=7), replace(like, max_train_examples=20), replace(like, algorithm="fedprox")):
        store.add(replace(other, learning_rate=2.6), 10, rounds(0.999))
    capsys.readouterr()
    assert tune.main(given) == 0
    (row,) = rows_of(capsys)
    assert (row["trials"], row["accuracy"], row["learning-rate"], row["clip"]) == (3, 0.94, 2.5, 7.0)
    # Clients that weigh alike win where that is better than all else.
    store = Store(tmp_path / "s.jsonl")
    for seed in (100, 101):
        store.add(replace(earlier, seed=seed, weighting="uniform"), 10, rounds(0.95))
    assert tune.main(given) == 0
    (row,) = rows_of(capsys)
    assert (row["accuracy"], row["weighting"], row["clip"]) == (0.95, "uniform", 7.0)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_settings_of_each_method_are_there_and_all_have_an_effect(algorithm: str) -> None:
    config = tuned("cifar10", algorithm)
    assert (config.algorithm, config.alpha, config.local_epochs, config.batch_size) == (algorithm, 0.1, 5, 64)
    assert settings_without_effect(config) == []
    assert set(tune.SPACES[algorithm].first) == set(tune.SPACES[algorithm].of)
    assert (CONFIGS / f"cifar10-{algorithm}.toml").read_text().startswith("# Expected: accuracy 0.")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_is_not_tuned_is_where_a_search_would_begin(algorithm: str, tmp_path: Path) -> None:
    given = ["--datasets", "cifar100", "--methods", algorithm, "--trials", "0", "--configs", str(tmp_path)]
    assert tune.main(given) == 0
    (written,) = tmp_path.iterdir()
    assert (CONFIGS / written.name).read_text() == written.read_text()


def test_pages_are_made_without_the_library_that_searches() -> None:
    code = "import sys; sys.modules['optuna'] = None; import benchmarks.results, benchmarks.vision"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=results.ROOT)


def test_every_method_of_the_paper_is_a_row() -> None:
    assert all(set(row) <= set(METHODS) for row in PAPER.values())


def test_a_budget_picks_the_largest_version_that_fits() -> None:
    assert pick_version(100 * 3600.0, epochs=5, rate=4000.0) == VERSIONS[0]
    assert pick_version(1.0, epochs=5, rate=4000.0) == VERSIONS[-1]
    # 10 s to start; 5,000 images of 5 epochs in 10 rounds and 10 tests of 10,000 at a third: 283,333 images.
    wanted = Version(5_000, 10)
    assert pick_version(10 + 283_334 / 4000, epochs=5, rate=4000.0) == wanted
    assert pick_version(10 + 283_332 / 4000, epochs=5, rate=4000.0) == VERSIONS[VERSIONS.index(wanted) + 1]


def test_sweeps_vary_one_thing() -> None:
    case = Case("cifar10", 0.1, Version(0, 0, 0))
    epochs = [(one.version.rounds, one.version.epochs) for one in vision.SWEEPS["epochs"](case)]
    assert epochs == [(50, 10), (100, 5), (500, 1)]
    for name, of in (("clients", "nodes"), ("participation", "participation"), ("alpha", "alpha")):
        swept = vision.SWEEPS[name](case)
        assert len({getattr(one, of) for one in swept}) == len(swept) >= 3
        same = [{key: value for key, value in vars(one).items() if key != of} for one in swept]
        assert all(one == same[0] for one in same)
    config = Case("cifar10", 0.3, Version(), nodes=100, participation=0.1).config("fedavg", 3, None)
    assert (config.fraction_train, config.min_available_nodes, config.alpha, config.seed) == (0.1, 100, 0.3, 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--methods", "sgd"], "--methods=sgd; allowed, joined by commas: fedavg, "),
        (["--alphas", "0"], "alpha=0.0 is not allowed; allowed: number > 0"),
        (["--seeds", "0"], "--seeds=0 is not allowed; allowed: >= 1"),
        (
            ["--sweep", "epochs", "--rounds", "15", "--epochs", "1"],
            "15 local epochs in all are not a multiple of 10",
        ),
        (["--budget-minutes", "5", "--rounds", "3"], "--budget-minutes picks a version itself"),
    ],
)
def test_bad_arguments_are_named(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        vision.main(given)
    assert message in capsys.readouterr().err


def run(method: str, seed: int, accuracies: list[float], megabytes: float, seconds: float) -> Run:
    settings = settings_of(Case("cifar10", 0.1, Version(100, 2, 1)).config(method, seed, None))
    rounds = [
        {
            "round": number,
            "test-accuracy": accuracy,
            "uplink-bytes": megabytes * 1e6 if number else 0.0,
            "local-steps": 7.0 if number else float("nan"),
            "seconds": 2 * seconds,
            "cpu-seconds": seconds if number else 0.0,
        }
        for number, accuracy in enumerate(accuracies)
    ]
    provenance = dict.fromkeys(("commit", "flwr", "torch", "python", "processor", "cores", "command", "date"), "–")
    return Run(settings, 10, rounds, "", {**provenance, "accelerator": "none"})


def test_a_row_tells_what_is_bought_for_fedavgs_bytes_and_seconds() -> None:
    runs = [run("fedavg", 0, [0.1, 0.2, 0.3], 1.0, 1.0), run("fedpm", 0, [0.1, 0.3, 0.4], 1.5, 1.4)]
    fedavg, fedpm = vision.rows_of(runs)
    assert (fedpm["rounds_to_fedavg"], fedavg["rounds_to_fedavg"]) == (1, 2)
    # 2 MB are a round and a third, 2 s a round and 3/7.
    assert fedpm["at_fedavgs_mb"] == pytest.approx(0.3 + 0.1 / 3, abs=1e-4)
    assert fedpm["at_fedavgs_seconds"] == pytest.approx(0.3 + 0.1 * 3 / 7, abs=1e-4)
    assert fedavg["at_fedavgs_seconds"] == 0.3
    assert (fedpm["uplink_mb"], fedpm["local_steps"], fedpm["seconds"]) == (3.0, 14.0, 2.8)
    assert fedpm["accuracy_std"] is None
    with_failure = [*runs, replace(run("fedpm", 1, [], 0, 0), failure="failed: it diverged")]
    assert [row["accuracy_mean"] for row in vision.rows_of(with_failure)] == [0.3, None]
    assert "| 1 of 2 runs failed, the others 0.400 |" in results.make_blocks(with_failure)["vision"]


def test_pages_are_made_from_runs(tmp_path: Path) -> None:
    runs = [
        run(method, seed, [0.1, 0.2, last + 0.02 * seed], 1.0, 1.0)
        for method, last in (("fedavg", 0.3), ("fedpm", 0.4))
        for seed in (0, 1)
    ]
    text = results.make_blocks(runs)["vision"]
    assert "| `fedpm`  | 0.410 ± 0.014 | 2     |" in text
    assert "the first 100 images, 2 rounds of 1 local epoch, 10 clients" in text
    assert "the first 100 images, 2 rounds of 1 local epoch" in results.make_blocks(runs)["headline"]
    assert len(results.stale_pictures(runs, tmp_path)) == 1
    results.draw(runs, tmp_path)
    (picture,) = tmp_path.iterdir()
    assert picture.stat().st_size > 10_000
    assert f"(images/{picture.name})" in text
    assert results.stale_pictures(runs, tmp_path) == []
    results.check_pictures(runs, {picture.stem: {}, "other": {"curves": [PANEL]}})
    with pytest.raises(ValueError, match=f"{picture.stem}.json: the picture {picture.stem}.png is made of runs"):
        results.check_pictures(runs, {picture.stem: {"curves": [PANEL]}})
    other = replace(runs[0], rounds=[*runs[0].rounds[:-1], {**runs[0].rounds[-1], "test-accuracy": 0.401}])
    assert results.stale_pictures([other, *runs[1:]], tmp_path) == [picture.name]


def test_only_runs_by_the_settings_that_count_now_are_shown(tmp_path: Path) -> None:
    store = Store(tmp_path / "vision.jsonl")
    config = Case("cifar10", 0.1, Version(100, 1, 1)).config("fedpm", 0, None)
    rounds = [{"round": 0, "test-accuracy": 0.1}, {"round": 1, "test-accuracy": 0.2}]
    for other in (config, replace(config, learning_rate=0.77), replace(config, validation_share=0.2)):
        store.add(other, 10, rounds)
    store.add(config, 10, [rounds[0], {"round": 1, "test-accuracy": 0.3}])
    assert [one.rounds[-1]["test-accuracy"] for one in results.load(tmp_path)] == [0.3]


PANEL = Panel(
    title="a9a",
    x="round",
    y="distance",
    decades=(1e-3, 10),
    lines={"fedpm K=1": Line([0, 1], [1.0, math.inf]), "fedpm K=3": Line([0, 1], [1.0, 0.1])},
)


def test_a_label_looks_alike_in_all_panels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Figure] = []
    monkeypatch.setattr(panels, "save", lambda figure, path, mark: seen.append(figure))
    only: Panel = {**PANEL, "title": "w8a", "lines": {"fedpm K=3": PANEL["lines"]["fedpm K=3"]}}
    panels.plot_panels([PANEL, only], tmp_path / "x.png")
    first, second = seen[0].axes
    assert [line.get_linestyle() for line in first.get_lines()] == ["-", "--"]
    assert [line.get_linestyle() for line in second.get_lines()] == ["--"]
    assert (first.get_yscale(), second.get_title(), second.get_ylim()) == ("log", "w8a", (1e-3, 10))
    assert [text.get_text() for text in seen[0].legends[0].get_texts()] == ["fedpm K=1", "fedpm K=3"]


def test_what_a_benchmark_has_written_is_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["x.py", "--threads", "2"])
    several, one = {"seconds_mean": 0.51236, "seconds_std": 0.0123}, {"seconds_mean": 0.4, "seconds_std": None}
    publish("server", [{"method": "fedpm", **several}, {"method": "fedavg", **one}], tmp_path / "a.json", "foot")
    publish("wire", [{"method": "fedavg", **one}], tmp_path / "b.json", curves=[PANEL])
    documents = results.published_documents(tmp_path)
    assert documents["b"]["curves"][0]["lines"]["fedpm K=1"] == [[0, 1], [1.0, None]]
    blocks = results.published_blocks(documents)
    assert blocks.keys() == {"a", "b"}
    table, foot, origin, command = blocks["a"].split("\n\n")
    assert [line.split() for line in table.splitlines()[2:]] == [
        ["|", "fedpm", "|", "0.5124", "±", "0.012", "|"],
        ["|", "fedavg", "|", "0.4", "|"],
    ]
    assert foot == "foot"
    assert f"torch {torch.__version__}, Flower {flwr.__version__}" in origin
    assert command == "    python -m benchmarks.server --threads 2\n"
    assert "foot" not in blocks["b"]
    assert blocks["b"].split("\n\n")[1] == "![wire](images/b.png)"
    assert results.stale_pictures([], tmp_path, documents) == ["b.png"]
    results.draw([], tmp_path, documents)
    assert [path.name for path in tmp_path.glob("*.png")] == ["b.png"]
    assert results.stale_pictures([], tmp_path, documents) == []
    publish("wire", [{"method": "fedavg", **one}], tmp_path / "b.json", curves=[PANEL, {**PANEL, "title": "w8a"}])
    assert results.stale_pictures([], tmp_path, results.published_documents(tmp_path)) == ["b.png"]

    uneven = {**PANEL, "lines": {"fedpm": ([0, 1], [1.0])}}
    publish("wire", [{"method": "fedavg", **one}], tmp_path / "b.json", curves=[uneven])
    with pytest.raises(ValueError, match=r"b\.json: .* fedpm: 2 values of x, and 1 of y"):
        results.published_documents(tmp_path)
    (tmp_path / "b.json").unlink()

    (tmp_path / "c.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match=r"c\.json: not a benchmark's table: KeyError"):
        results.published_documents(tmp_path)


@pytest.mark.parametrize(
    ("names", "place", "message"),
    [
        ({"a", "vision"}, "a", "vision.json: the block vision is made of runs"),
        ({"a"}, "b_2", "<!-- results: b_2 -->: there is no such block; allowed: a, vision"),
        ({"a", "b"}, "a", "has a place for b: <!-- results: b -->"),
    ],
)
def test_a_block_has_a_name_and_a_place(names: set[str], place: str, message: str) -> None:
    texts = [f"x\n<!-- results: {name} -->\nold\n<!-- end -->\n" for name in ("vision", place)]
    results.check_places({"vision": "v"}, {"a": "t"}, [texts[0], texts[1].replace(place, "a")])
    with pytest.raises(ValueError, match=re.escape(message)):
        results.check_places({"vision": "v"}, dict.fromkeys(names, "t"), texts)


def test_the_pages_are_what_the_runs_give() -> None:
    assert results.main(["--check"]) == 0
    page = (results.ROOT / "docs" / "results.md").read_text()
    for name, block in results.published_blocks(results.published_documents(RESULTS)).items():
        assert f"<!-- results: {name} -->\n{block}<!-- end -->" in page
    blocks = results.make_blocks(results.load(RESULTS), results.load_ablation(RESULTS))
    for page, name in (("docs/results.md", "vision"), ("README.md", "headline")):
        text = (results.ROOT / page).read_text()
        assert f"<!-- results: {name} -->\n{blocks[name]}<!-- end -->" in text
