"""What a thousand clients take: whole runs of Flower's simulation, FedPM beside FedAvg, in the same harness.

    python -m benchmarks.simulation [--clients 100,1000] [--methods fedpm,fedpm:auto,fedavg] [--repeats 3]

Each run is ``flwr run`` with that many SuperNodes over Ray (scripts/simulate.py), on 20,000 noisy copies of
scikit-learn's digits, 64 features, a linear model, Dirichlet 0.1. fedpm: FOOF's matrices in full, or by the
codec after the colon. The methods take turns, and each number is the median of theirs: the first run of all finds
nothing in the machine's caches.

Columns: seconds, from the command's start to its end; range_seconds, from the shortest run's to the longest's;
times_fedavg; start_seconds, before the first round:
SuperLink, installation, Ray; first_round, which has the imports of Ray's workers, their data and partitions, and
the question to each node which partition it has; round_seconds, of the rounds after it, on average; work_seconds,
of the same rounds in one process without Ray: the work of clients and server itself. What round_seconds are more
than a core's share of that is Flower's and Ray's: handing out messages, their copies, polling.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from fedpm_flwr.config import Config, ConfigError, check_codec
from fedpm_flwr.report import PREFIX

from .arguments import make_parser, whole_numbers
from .on_ray import run_on_ray
from .runs import Rounds, run_all
from .table import Row, publish, rounded, with_times_fedavg

_EXAMPLES, _NOISE = 20_000, 0.05


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parse(arguments)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="fedpm-flwr-") as folder:
        data = make_data(Path(folder))
        for clients in given.clients:
            runs = dict[str, list[dict[str, float]]]()
            for repeat in range(given.repeats):
                for method in given.methods:
                    output = Path(folder) / f"{method}-{clients}-{repeat}"
                    config = config_of(method, clients, given.rounds, data, output)
                    runs.setdefault(method, []).append(measure(config, clients))
                    print(f"{PREFIX}{method}, {clients} clients: {runs[method][-1]}", flush=True)
            for method in given.methods:
                config = config_of(method, clients, given.rounds, data, Path(folder) / f"{method}-{clients}")
                rows.append(row_of(config, runs[method], clients))
    rows = with_times_fedavg(rows)
    publish("simulation", rows, given.output, rounds=given.rounds, repeats=given.repeats)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("simulation", __doc__)
    parser.add_argument("--clients", default="100,1000", help="default: %(default)s")
    parser.add_argument("--methods", default="fedpm,fedpm:auto,fedavg", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (default: %(default)s)")
    given = parser.parse_args(arguments)
    given.methods = given.methods.split(",")
    for method in given.methods:
        algorithm, _, codec = method.partition(":")
        try:
            Config(algorithm=algorithm)
            if codec:
                check_codec(codec)
        except ConfigError as error:
            parser.error(str(error))
    given.clients = whole_numbers(given.clients)
    if min(*given.clients, given.rounds - 1, given.repeats) < 1:
        parser.error("--clients, --rounds and --repeats are whole numbers; allowed: >= 1, but >= 2 rounds")
    return given


def make_data(folder: Path) -> Path:
    """Digits, each many times, with noise: enough examples for a thousand clients."""
    digits, random = load_digits(), np.random.default_rng(0)
    x, y = (digits.data / 16).astype(np.float32), digits.target
    chosen = random.integers(len(x), size=_EXAMPLES)
    noise = random.normal(0.0, _NOISE, (_EXAMPLES, x.shape[1])).astype(np.float32)
    path = folder / "digits.npz"
    np.savez(path, x_train=x[chosen] + noise, y_train=y[chosen], x_test=x, y_test=y)
    return path


def config_of(method: str, clients: int, rounds: int, data: Path, output: Path) -> Config:
    """The settings of a run, one pass over the data a round."""
    algorithm, _, codec = method.partition(":")
    more: dict[str, Any] = {"codec": codec} if codec else {}
    return Config(
        algorithm=algorithm,
        dataset=f"npz:{data}",
        model="linear",
        num_server_rounds=rounds,
        local_epochs=1,
        min_available_nodes=clients,
        output=str(output),
        **more,
    )


def measure(config: Config, clients: int) -> dict[str, float]:
    """Seconds of one run on Ray."""
    started = time.perf_counter()
    ran = run_on_ray([config], clients)
    seconds = time.perf_counter() - started
    if not ran:
        raise SystemExit(f"{config.algorithm} with {clients} clients failed; see above")
    (real,) = ran.values()
    return {
        "seconds": rounded(seconds),
        "start_seconds": rounded(seconds - sum(row["seconds"] for row in real[1:])),
        "first_round": rounded(real[1]["seconds"]),
        "round_seconds": _mean_seconds(real),
    }


def row_of(config: Config, runs: Sequence[dict[str, float]], clients: int) -> Row:
    """The medians of these runs of a method, and its rounds in one process."""
    (alone,) = run_all([config], clients, 1).values()
    every = [run["seconds"] for run in runs]
    return {
        "clients": clients,
        "method": config.algorithm,
        "codec": config.codec if config.algorithm == "fedpm" else None,
        **{key: rounded(statistics.median(run[key] for run in runs)) for key in runs[0]},
        "range_seconds": rounded(max(every) - min(every)),
        "work_seconds": _mean_seconds(alone),
    }


def _mean_seconds(rounds: Rounds) -> float:
    """Of the rounds after the first."""
    return rounded(statistics.fmean(row["seconds"] for row in rounds[2:]))


if __name__ == "__main__":
    sys.exit(main())
