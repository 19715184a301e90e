"""Tables and pictures of docs/results.md and README.md, from what is kept in benchmarks/results.

    python -m benchmarks.results [--check]

Between ``<!-- results: NAME -->`` and ``<!-- end -->`` a page holds what is made here; all else is written by
hand. Of the runs in NAME.jsonl only those by the settings that are now in benchmarks/configs count, and in the
ablation those by its base. NAME.json is what a benchmark has written by --output, the block NAME its table, and
NAME.png a picture of its curves, where it has some.
--check changes nothing, and fails if the pages are not what these files give, or a picture was drawn of others.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedpm_flwr.config import Config, ConfigError, Value
from fedpm_flwr.report import PREFIX

from . import ablation
from .experiments import DATASETS, METHODS, RESULTS, tuned
from .panels import Panel, mark_of_panels, plot_panels, read_mark, read_panels
from .pictures import mark_of, plot_curves, plot_sweep
from .runs import Run, Store, data_of, settings_of
from .sections import (
    LABELS,
    Sweep,
    ablation_section,
    accuracies_of,
    headline,
    name_of,
    published,
    runs_of,
    section,
    sweep_name,
    sweep_section,
)
from .vision import SWEEPS, Case, case_of, method_of

ROOT = Path(__file__).parent.parent
PAGES = ("docs/results.md", "README.md")
IMAGES = Path("docs", "images")
Documents = Mapping[str, Mapping[str, Any]]
_BLOCK = re.compile(r"(<!-- results: (?P<name>\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.results", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--check", action="store_true", help="fail if a page or a picture is not what benchmarks/results gives"
    )
    given = parser.parse_args(arguments)
    try:
        runs, texts = load(RESULTS), [(ROOT / page).read_text(encoding="utf-8") for page in PAGES]
        documents = published_documents(RESULTS)
        made, written = make_blocks(runs, load_ablation(RESULTS)), published_blocks(documents)
        check_places(made, written, texts)
        check_pictures(runs, documents)
    except ValueError as error:
        print(f"{PREFIX}{error}", file=sys.stderr)
        return 2
    blocks = made | written
    stale = [page for page in PAGES if not _renew(ROOT / page, blocks, write=not given.check)]
    if given.check:
        stale += [str(IMAGES / name) for name in stale_pictures(runs, ROOT / IMAGES, documents)]
        for name in stale:
            print(f"{PREFIX}{name} is not what benchmarks/results gives; make results renews it", file=sys.stderr)
        return 1 if stale else 0
    draw(runs, ROOT / IMAGES, documents)
    return 0


def load(folder: Path) -> list[Run]:
    """All runs of the tables, by the settings that now count, the newest of each method, case and seed."""
    newest: dict[tuple[object, ...], Run] = {}
    for run in Store(folder / "vision.jsonl").runs:
        if _is_tuned(run):
            newest[case_of(run), method_of(run), run.settings["seed"]] = run
    return sorted(newest.values(), key=lambda run: METHODS.index(method_of(run)))


def load_ablation(folder: Path) -> list[Run]:
    """All runs of variants of today's base."""
    runs = [run for dataset in DATASETS for run in Store(folder / f"ablation-{dataset}.jsonl").runs]
    return [run for run in runs if ablation.variant_of(run) is not None]


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


def compared(runs: Iterable[Run]) -> dict[Case, list[Run]]:
    """The runs of each case in which there are several methods."""
    cases: dict[Case, list[Run]] = {}
    for run in runs:
        cases.setdefault(case_of(run), []).append(run)
    several = {case: own for case, own in cases.items() if len({method_of(run) for run in own}) > 1}
    return dict(sorted(several.items(), key=lambda pair: name_of(pair[0])))


def sweeps_of(cases: Mapping[Case, Sequence[Run]]) -> list[Sweep]:
    """Those whose cases are all there, with a seed and two methods in common; a run that failed is there."""
    found = {}
    for case in cases:
        for kind, vary in SWEEPS.items():
            swept = tuple(vary(case))
            if not set(swept) <= cases.keys():
                continue
            methods = [method for method in METHODS if all(_seeds(cases[one], method) for one in swept)]
            seeds = [_seeds(cases[one], method) for one in swept for method in methods]
            if len(methods) > 1 and set.intersection(*seeds):
                found[kind, swept] = Sweep(kind, swept, tuple(methods))
    return sorted(found.values(), key=lambda sweep: (tuple(SWEEPS).index(sweep.kind), sweep_name(sweep)))


def _seeds(runs: Iterable[Run], method: str) -> set[Value]:
    return {run.settings["seed"] for run in runs if method_of(run) == method}


def sections_of(runs: Iterable[Run]) -> tuple[dict[Case, list[Run]], list[Sweep]]:
    """The cases with a table and a picture for each; the others are told in sweeps."""
    cases = compared(runs)
    sweeps = sweeps_of(cases)

    def is_told(case: Case, own: Sequence[Run]) -> bool:
        methods = {method_of(run) for run in own}
        return any(case in sweep.cases and methods <= set(sweep.methods) for sweep in sweeps)

    return {case: own for case, own in cases.items() if not is_told(case, own)}, sweeps


def draw(runs: Sequence[Run], folder: Path, documents: Documents = MappingProxyType({})) -> None:
    """A picture for each section, and for each benchmark's table that has curves."""
    cases, sweeps = sections_of(runs)
    for case, own in cases.items():
        plot_curves(own, folder / f"{name_of(case)}.png")
    for sweep in sweeps:
        ticks = [LABELS[sweep.kind](case) for case in sweep.cases]
        path = folder / f"{sweep_name(sweep)}.png"
        plot_sweep(accuracies_of(sweep, runs), ticks, path, runs_of(sweep, runs))
    for name, panels in _curves(documents).items():
        plot_panels(panels, folder / f"{name}.png")


def _curves(documents: Documents) -> dict[str, list[Panel]]:
    return {
        name: read_panels(document["curves"]) for name, document in documents.items() if document.get("curves")
    }


def stale_pictures(runs: Sequence[Run], folder: Path, documents: Documents = MappingProxyType({})) -> list[str]:
    """Those that are missing, or were drawn of other runs or curves."""
    cases, sweeps = sections_of(runs)
    of = {name_of(case): mark_of(own) for case, own in cases.items()}
    of |= {sweep_name(sweep): mark_of(runs_of(sweep, runs)) for sweep in sweeps}
    of |= {name: mark_of_panels(panels) for name, panels in _curves(documents).items()}
    return [f"{name}.png" for name, mark in of.items() if read_mark(folder / f"{name}.png") != mark]


def check_pictures(runs: Sequence[Run], documents: Documents) -> None:
    """No benchmark's picture takes the place of another.

    Raises:
        ValueError: which does.
    """
    cases, sweeps = sections_of(runs)
    of_runs = {*map(name_of, cases), *map(sweep_name, sweeps)}
    for name in sorted(of_runs & _curves(documents).keys()):
        raise ValueError(f"{name}.json: the picture {name}.png is made of runs; call the file otherwise")


def make_blocks(runs: Sequence[Run], of_ablation: Sequence[Run] = ()) -> dict[str, str]:
    """The text of each block, by its name."""
    cases, sweeps = sections_of(runs)
    return {
        "vision": "\n".join(section(case, own) for case, own in cases.items()),
        "sweeps": "\n".join(sweep_section(sweep, runs) for sweep in sweeps),
        "ablation": ablation_section(of_ablation) if of_ablation else "",
        "headline": headline(cases),
    }


def published_documents(folder: Path) -> Documents:
    """What benchmarks have written there by --output, by its file's name.

    Raises:
        ValueError: naming a file that no benchmark has written.
    """
    documents = {}
    for path in sorted(folder.glob("*.json")):
        try:
            documents[path.stem] = json.loads(path.read_text(encoding="utf-8"))
            published(documents[path.stem], "")
            read_panels(documents[path.stem].get("curves", ()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not a benchmark's table: {type(error).__name__}: {error}") from error
    return documents


def published_blocks(documents: Documents) -> dict[str, str]:
    """The text of each block that is one benchmark's table, by its file's name."""
    return {name: published(document, f"images/{name}.png") for name, document in documents.items()}


def check_places(made: Mapping[str, str], written: Mapping[str, str], texts: Iterable[str]) -> None:
    """Each block has a name of its own, and a place in a page.

    Raises:
        ValueError: which has not.
    """
    for name in made.keys() & written.keys():
        raise ValueError(f"{name}.json: the block {name} is made of runs; call the file otherwise")
    blocks = made.keys() | written.keys()
    places = {match["name"] for text in texts for match in _BLOCK.finditer(text)}
    for name in sorted(places - blocks):
        raise ValueError(f"<!-- results: {name} -->: there is no such block; allowed: {', '.join(sorted(blocks))}")
    for name in sorted(blocks - places):
        raise ValueError(f"neither of {', '.join(PAGES)} has a place for {name}: <!-- results: {name} -->")


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
