"""Tables and pictures of docs/results.md and README.md, from the runs that are kept in benchmarks/results.

    python -m benchmarks.results [--check]

Between ``<!-- results: NAME -->`` and ``<!-- end -->`` a page holds what is made here; all else is written by
hand. Only runs by the settings that are now in benchmarks/configs count. --check changes nothing, and fails if
the pages are not what the runs give.
"""

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

from fedpm_flwr.config import Config, ConfigError, Value
from fedpm_flwr.report import PREFIX

from .experiments import DATASETS, METHODS, NODES, RESULTS, tuned
from .runs import Run, Store, settings_of
from .table import Row, format_table
from .vision import case_of, data_of, method_of, rows_of, seconds_key

ROOT = Path(__file__).parent.parent
PAGES = ("docs/results.md", "README.md")
_BLOCK = re.compile(r"(<!-- results: (?P<name>[a-z0-9-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_AXES = (
    ("round", "round"),
    ("uplink-bytes", "MB from clients"),
    ("local-steps", "local steps a client"),
    ("s", "s"),
)
_TITLES = {"cifar10": "CIFAR-10, LeNet", "cifar100": "CIFAR-100, ResNet18-GN"}
_NOT_EXACT = (
    "The CIFAR-10 file has all labels and the order exact; 59,907 of its 60,000 images are bit-exact, 93 "
    "(73 training, 20 test; 88 ships and 5 horses) are decoded JPEGs, off by about 6 grey levels on average."
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.results", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="fail if a page is not what the runs give")
    given = parser.parse_args(arguments)
    blocks = make_blocks(load(RESULTS))
    stale = [page for page in PAGES if not _renew(ROOT / page, blocks, write=not given.check)]
    if given.check:
        for page in stale:
            print(f"{PREFIX}{page} is not what benchmarks/results gives; make results renews it", file=sys.stderr)
        return 1 if stale else 0
    for name, runs in pictures(load(RESULTS)).items():
        plot(runs, ROOT / "docs" / "images" / f"{name}.png")
    return 0


def load(folder: Path) -> list[Run]:
    """All runs of the tables, by the settings that now count, the newest of each method, case and seed."""
    newest: dict[tuple[object, ...], Run] = {}
    for path in sorted(folder.glob("vision*.jsonl")):
        for run in Store(path).runs:
            if _is_tuned(run):
                newest[(*case_of(run), method_of(run), run.settings["seed"])] = run
    return sorted(newest.values(), key=lambda run: METHODS.index(method_of(run)))


def _is_tuned(run: Run) -> bool:
    dataset, method = data_of(run), method_of(run)
    if dataset not in DATASETS or method not in METHODS:
        return False
    try:
        now = settings_of(tuned(dataset, method))
    except ConfigError:
        return False
    then = {**settings_of(Config()), **run.settings}
    of_a_case = (
        "dataset", "max-train-examples", "alpha", "num-server-rounds", "local-epochs", "fraction-train", "seed",
        "min-available-nodes", "validation-share",
    )  # fmt: skip
    return not then["validation-share"] and all(then[key] == now[key] for key in now if key not in of_a_case)


def pictures(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """The runs of each case that compares several methods, under the name of its picture."""
    cases: dict[str, list[Run]] = {}
    for run in runs:
        cases.setdefault(name_of(run), []).append(run)
    compared = {name: own for name, own in cases.items() if len({method_of(run) for run in own}) > 1}
    return dict(sorted(compared.items()))


def name_of(run: Run) -> str:
    """Of its case, for a file and a block."""
    keys = ("alpha", "max-train-examples", "num-server-rounds", "local-epochs", "fraction-train")
    alpha, images, rounds, epochs, share = (run.settings[key] for key in keys)
    name = f"{data_of(run)}-alpha{alpha}-images{images or 'all'}-rounds{rounds}-epochs{epochs}-clients{run.nodes}"
    return (name if share == 1.0 else f"{name}-share{share}").replace(".", "_")


def make_blocks(runs: Sequence[Run]) -> dict[str, str]:
    """The text of each block, by its name."""
    cases = pictures(runs)
    sections = "\n".join(_section(name, own) for name, own in cases.items())
    return {"vision": sections, "headline": _headline(list(cases.values()))}


def _headline(cases: Sequence[Sequence[Run]]) -> str:
    """The version that most methods were run in, of several that with most runs: all its α in one table."""
    versions: dict[tuple[Value, ...], list[Run]] = {}
    for own in cases:
        if own[0].nodes == NODES and own[0].settings["fraction-train"] == 1.0:
            keys = ("dataset", "max-train-examples", "num-server-rounds", "local-epochs")
            versions.setdefault(tuple(own[0].settings[key] for key in keys), []).extend(own)
    if not versions:
        return ""
    chosen = max(versions.values(), key=lambda own: (len({method_of(run) for run in own}), len(own)))
    rows = rows_of(chosen)
    alphas = sorted({float(str(row["alpha"])) for row in rows}, reverse=True)
    first, seeds = chosen[0].settings, {run.settings["seed"] for run in chosen}
    about = (
        f"{_TITLES[data_of(chosen[0])]}, {_images(chosen[0])}, {first['num-server-rounds']} rounds of "
        f"{first['local-epochs']} local epochs, {NODES} clients; test accuracy, mean ± standard deviation over "
        f"{len(seeds)} seeds. The paper's are of 100 rounds on all images, with a CNN that it does not tell.\n\n"
    )
    table: list[Row] = []
    for name in dict.fromkeys(_name(row) for row in rows):
        named = {row["alpha"]: row for row in rows if _name(row) == name}
        table.append(
            {"method": name}
            | {f"α = {alpha:g}": _accuracy(named[alpha]) if alpha in named else None for alpha in alphas}
            | {
                f"the paper's, α = {alpha:g}": named[alpha]["paper"] if alpha in named else None
                for alpha in alphas
            }
        )
    return f"{about}{format_table(table)}\n"


def _section(name: str, runs: Sequence[Run]) -> str:
    settings = runs[0].settings
    title = (
        f"### {_TITLES[data_of(runs[0])]}, α = {settings['alpha']}: "
        f"{_images(runs[0])}, {settings['num-server-rounds']} rounds of "
        f"{settings['local-epochs']} local epochs, {runs[0].nodes} clients"
    )
    if settings["fraction-train"] != 1.0:
        title += f", {settings['fraction-train']} of them in a round"
    rows = [_printed(row) for row in rows_of(runs)]
    return "\n".join(
        [title, "", format_table(rows), "", f"![Test accuracy](images/{name}.png)", "", _provenance(runs), ""]
    )


def _images(run: Run) -> str:
    images = run.settings["max-train-examples"]
    return f"the first {images:,} images" if images else "all images"


def _printed(row: Row) -> Row:
    return {
        "method": _name(row),
        "test accuracy": _accuracy(row),
        "seeds": row["seeds"],
        "the paper's (100 rounds, all images)": row["paper"],
        "rounds to FedAvg's": row.get("rounds_to_fedavg"),
        "at FedAvg's MB": row.get("at_fedavgs_mb"),
        "at FedAvg's seconds": row.get("at_fedavgs_seconds"),
        "uplink, MB": row.get("uplink_mb"),
        "seconds": row.get("seconds"),
    }


def _name(row: Row) -> str:
    return f"`{row['method']}`" + (", codec `auto`" if row["codec"] == "auto" else "")


def _accuracy(row: Row) -> str:
    mean, deviation = row["accuracy_mean"], row.get("accuracy_std")
    if not isinstance(mean, float):
        return f"{row['failed']} of {row['seeds']} runs failed"
    return f"{mean:.3f} ± {deviation:.3f}" if isinstance(deviation, float) else f"{mean:.3f}"


def _provenance(runs: Sequence[Run]) -> str:
    def told(key: str) -> str:
        return ", ".join(sorted({str(run.provenance[key]) for run in runs}))

    seeds = ", ".join(str(seed) for seed in sorted({int(run.settings["seed"]) for run in runs}))
    commands = sorted({str(run.provenance["command"]) for run in runs})
    exact = f" {_NOT_EXACT}" if any(run.settings["dataset"] == "npz:cifar10.npz" for run in runs) else ""
    return (
        f"Seeds {seeds}; {told('date')}; commit {told('commit')}; torch {told('torch')}, Flower {told('flwr')}, "
        f"Python {told('python')}; {told('processor')}, {told('cores')} cores, "
        f"accelerator: {told('accelerator')}.{exact}\n\n"
        + "\n".join(f"    python -m benchmarks.vision {command}" for command in commands)
    )


def plot(runs: Sequence[Run], path: Path) -> None:
    """Mean test accuracy against rounds, bytes, local steps and seconds, a line a method."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    methods: dict[str, list[Run]] = {}
    for run in runs:
        if not run.failure:
            methods.setdefault(method_of(run), []).append(run)
    figure = Figure(figsize=(14, 4), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(1, len(_AXES), sharey=True), _AXES, strict=True):
        axes.set_prop_cycle(color=[colormaps["tab20"](number) for number in (*range(0, 20, 2), *range(1, 20, 2))])
        for method, own in methods.items():
            at = [_mean(column) for column in zip(*(_along(run, key) for run in own), strict=True)]
            curves = [[row["test-accuracy"] for row in run.rounds] for run in own]
            (line,) = axes.plot(at, [_mean(c) for c in zip(*curves, strict=True)], label=method, marker=".")
            if len(own) > 1:
                low, high = ([pick(c) for c in zip(*curves, strict=True)] for pick in (min, max))
                axes.fill_between(at, low, high, color=line.get_color(), alpha=0.12)
        axes.set(xlabel="seconds of one core" if key == "s" else label)
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel="test accuracy")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def _along(run: Run, key: str) -> list[float]:
    """What had been spent after each round."""
    if key == "round":
        return [row["round"] for row in run.rounds]
    of = seconds_key(run) if key == "s" else key
    scale = 1e-6 if key == "uplink-bytes" else 1.0
    return [scale * total for total in accumulate(row[of] if row[of] == row[of] else 0.0 for row in run.rounds)]


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def _renew(page: Path, blocks: Mapping[str, str], *, write: bool) -> bool:
    """Whether a page has what the runs give; if not, and ``write``, it has then."""
    text = page.read_text(encoding="utf-8")
    new = _BLOCK.sub(_filled(blocks), text)
    if new != text and write:
        page.write_text(new, encoding="utf-8")
    return new == text


def _filled(blocks: Mapping[str, str]) -> Callable[["re.Match[str]"], str]:
    def fill(match: "re.Match[str]") -> str:
        return f"{match[1]}{blocks[match['name']]}{match[3]}"

    return fill


if __name__ == "__main__":
    sys.exit(main())
