"""What a round takes over gRPC: FedPM beside FedAvg, packed and not, with and without TLS, on this machine.

    python -m benchmarks.deployment [--methods fedavg,fedpm] [--tls false,true] [--rounds 4] [--repeats 2]

A SuperLink and SuperNodes, real processes on the loopback; one local step a round on a few random images, so that
what is measured is what is sent, and the new process that each message costs. The methods take turns.

- fedavg, strategy flwr: Flower's own FedAvg on Flower's own Grid, started by a ServerApp of a dozen lines: every
  parameter is an array of its own, and all replies are there before the first is looked at
- fedavg, strategy fedpm_flwr: this application's, without and with packed-arrays: one array per dtype
- fedpm: packed, and what curvature fits into 5 % more (codec auto)

Columns: round_seconds, the median of all rounds but each run's first; range_seconds, from the shortest of these to
the longest; times_flwr, the first over that of Flower's own FedAvg, with or without TLS alike.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedpm_flwr.config import MODELS, Config
from scripts.application import copy_application
from scripts.certificates import make as make_certificates
from scripts.federation import Federation
from scripts.processes import CHECKOUT

from .arguments import make_parser, split_names
from .runs import read_rounds
from .table import Row, publish, rounded

_IMAGES, _BATCH = 64, 8

_FLOWERS_OWN = '''
"""FedAvg as Flower's own examples start it; each round's seconds in metrics.json."""

import json
import time
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fedpm_flwr import messages
from fedpm_flwr.config import Config
from fedpm_flwr.tasks import build_model, load_dataset

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = Config.from_run_config(context.run_config)
    split = load_dataset(config.dataset, config.max_train_examples)
    model = build_model(config.model, split.input_shape, split.classes, config.seed, split.input_dtype)
    nodes, rows, started = config.min_available_nodes, [], time.monotonic()

    def end_of_round(server_round: int, arrays: ArrayRecord) -> None:
        nonlocal started
        now = time.monotonic()
        rows.append({"round": server_round, "seconds": now - started})
        started = now

    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes)
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(model.state_dict()),
        num_rounds=config.num_server_rounds,
        train_config=ConfigRecord({messages.FORM: split.form.to_text()}),
        evaluate_fn=end_of_round,
    )
    folder = Path(config.output)
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(rows))
'''


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    algorithm: str
    strategy: str
    packed: bool
    codec: str | None = None


METHODS = (
    Method("fedavg", "flwr", packed=False),
    Method("fedavg", "fedpm_flwr", packed=False),
    Method("fedavg", "fedpm_flwr", packed=True),
    Method("fedpm", "fedpm_flwr", packed=True, codec="auto"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parse(arguments)
    with tempfile.TemporaryDirectory(prefix="fedpm-flwr-") as folder:
        rows = list(measure(Path(folder), given))
    publish("deployment", rows, given.output, model=given.model, nodes=given.nodes, rounds=given.rounds)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("deployment", __doc__)
    parser.add_argument("--model", default="resnet18-gn", choices=MODELS, help="default: %(default)s")
    parser.add_argument("--nodes", type=int, default=2, help="SuperNodes (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=4, help="of a run (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each (default: %(default)s)")
    parser.add_argument("--methods", default="fedavg,fedpm", help="beside Flower's own (default: %(default)s)")
    parser.add_argument(
        "--tls", default="false,true", help="federations without it, with it (default: %(default)s)"
    )
    given = parser.parse_args(arguments)
    split_names(parser, given, methods=("fedavg", "fedpm"), tls=("false", "true"))
    if min(given.nodes, given.rounds - 1, given.repeats) < 1:
        parser.error("--nodes, --rounds and --repeats are whole numbers; allowed: >= 1, but >= 2 rounds")
    return given


def measure(folder: Path, given: argparse.Namespace) -> Iterator[Row]:
    """The rows, of one federation after another."""
    baseline, *others = METHODS
    methods = [baseline, *(method for method in others if method.algorithm in given.methods)]
    data = make_data(folder)
    flowers_own = copy_application(folder / "flowers-own", {"server_app.py": _FLOWERS_OWN})
    make_certificates(folder / "keys", ["127.0.0.1"], _sites(given.nodes))
    for tls in given.tls:
        keys = folder / "keys" if tls == "true" else None
        seconds: dict[Method, list[float]] = {method: [] for method in methods}
        uplink = dict[Method, float | None]()
        with Federation(folder / f"federation-{tls}", keys) as federation:
            for number, site in enumerate(_sites(given.nodes)):
                if keys:
                    federation.register(site)
                federation.start_node(site, f"partition-id={number} num-partitions={given.nodes}")
            for repeat in range(given.repeats):
                for place, method in enumerate(methods):
                    output = folder / f"run-{tls}-{repeat}-{place}"
                    config = config_of(method, given.model, given.nodes, given.rounds, data, output)
                    status = federation.run(config, flowers_own if method.strategy == "flwr" else CHECKOUT)
                    if status != "finished:completed":
                        raise SystemExit(f"{method.algorithm} did not complete: {status}")
                    rounds = read_rounds(output)
                    seconds[method] += [row["seconds"] for row in rounds[2:]]
                    uplink[method] = rounds[-1].get("uplink-bytes")
        yield from rows_of(seconds, uplink, tls)


def make_data(folder: Path) -> Path:
    """Random images, as CIFAR's: few, for it is not training that is measured."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (2 * _IMAGES, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(2 * _IMAGES) % 10
    path = folder / "images.npz"
    np.savez(
        path, x_train=images[:_IMAGES], y_train=labels[:_IMAGES], x_test=images[_IMAGES:], y_test=labels[_IMAGES:]
    )
    return path


def config_of(method: Method, model: str, nodes: int, rounds: int, data: Path, output: Path) -> Config:
    """The settings of a run."""
    settings: dict[str, Any] = {
        "algorithm": method.algorithm,
        "packed-arrays": method.packed,
        "dataset": f"npz:{data}",
        "partition": "iid",
        "model": model,
        "num-server-rounds": rounds,
        "min-available-nodes": nodes,
        "local-steps": 1,
        "batch-size": _BATCH,
        "clip": 1.0,
        "output": str(output),
    }
    return Config.from_run_config(settings | ({"codec": method.codec} if method.codec else {}))


def rows_of(
    seconds: Mapping[Method, Sequence[float]], uplink: Mapping[Method, float | None], tls: str
) -> list[Row]:
    """A row for each method; the first is what the others are compared with."""
    medians = {method: statistics.median(values) for method, values in seconds.items()}
    first = next(iter(medians.values()))
    return [
        {
            "method": method.algorithm,
            "strategy": method.strategy,
            "packed_arrays": str(method.packed).lower(),
            "codec": method.codec,
            "tls": tls,
            "round_seconds": rounded(medians[method]),
            "range_seconds": rounded(max(values) - min(values)),
            "times_flwr": rounded(medians[method] / first),
            "uplink_mb": None if (sent := uplink[method]) is None else rounded(sent / 1e6),
        }
        for method, values in seconds.items()
    ]


def _sites(nodes: int) -> list[str]:
    return [f"site-{number}" for number in range(nodes)]


if __name__ == "__main__":
    sys.exit(main())
