"""What each codec costs on the wire, and what it costs in accuracy.

    python -m benchmarks.wire [--models lenet,resnet18-gn] [--codecs auto,rank-8,…]
    python -m benchmarks.wire --data CIFAR10.npz [--seeds 5] [--clip 1.0] [--plot FILE.png]

Bytes: a client's real reply after a few FOOF steps on images of CIFAR-10's shape, beside the reply of the same
client under FedAvg. With --data, accuracy too: LeNet on CIFAR-10, 10 clients, Dirichlet 0.1, 12 rounds, for every
codec the same seeds, through the application's own ServerApp and ClientApp; LocalNewton and FedAvg beside it.
Local updates (FedAvg: gradients) are clipped to norm 1 (``clip``): without, a second-order client of few steps
diverges now and then, by any codec.

Columns: uplink_ratio, a reply's bytes by FedAvg's, all in; layers, of which curvature is sent; seconds to encode
and to decode; failed, of how many seeds the run did not come to an end, as where the model diverged; accuracy on
the test set after the last round, mean and standard deviation over seeds; minus_full, the mean difference to
triangle-float32 seed by seed, in points, and its standard error; MB from clients to server in all.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from fedpm_flwr import __version__
from fedpm_flwr.config import Config, ConfigError, check_codec
from fedpm_flwr.optim import FOOF
from fedpm_flwr.tasks import build_model
from fedpm_flwr.wire import decode, encode

from .arguments import make_parser
from .panels import Line, Panel, plot_panels
from .runs import Rounds, run_all
from .table import Row, publish, rounded

FULL = "triangle-float32"
_CODECS = (
    "triangle-float64,triangle-float32,triangle-bfloat16,triangle-int8,positions,rank-1,rank-4,rank-8,rank-0.9,diagonal,"
    "auto-0.02,auto,auto-0.1,auto-0.15"
)
_IN_TRAINING = "triangle-float32,triangle-int8,rank-8,diagonal,auto-0.02,auto,auto-0.1,auto-0.15"
_SHAPE, _CLASSES, _BATCH, _STEPS = (3, 32, 32), 10, 64, 2
_NODES = 10


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parse(arguments)
    if given.data is None:
        rows = [row for name in given.models for row in bytes_of(name, given.codecs or _CODECS.split(","))]
        publish("wire", rows, given.output)
        return 0
    codecs = list(dict.fromkeys([FULL, *(given.codecs or _IN_TRAINING.split(","))]))
    ratios = {str(row["codec"]): row for row in bytes_of("lenet", codecs)}
    with tempfile.TemporaryDirectory() as folder:
        plans = configs(given, codecs, Path(folder))
        done = run_all([config for own in plans.values() for config in own], _NODES, given.jobs)
    runs = {label: [done[c.output] for c in own if c.output in done] for label, own in plans.items()}
    complete = {label: found for label, found in runs.items() if len(found) == given.seeds}
    rows = [
        trained(label, found, complete.get(FULL) if label in complete else None, ratios.get(label), given.seeds)
        for label, found in runs.items()
    ]
    panels = [panel(complete)]
    asked = {key: getattr(given, key) for key in ("seeds", "rounds", "clip")}
    publish("wire", rows, given.output, **asked, curves=panels)
    if given.plot:
        plot_panels(panels, given.plot)
    return 0 if len(complete) == len(plans) else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("wire", __doc__)
    parser.add_argument("--models", default="lenet,resnet18-gn", help="default: %(default)s")
    parser.add_argument("--codecs", help=f"default: {_CODECS}; with --data: {_IN_TRAINING}")
    parser.add_argument("--data", type=Path, help="CIFAR-10 as .npz: measure accuracy too")
    parser.add_argument("--seeds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=12, help="default: %(default)s")
    parser.add_argument(
        "--clip", type=float, default=1.0, help="largest norm of an update; FedAvg: of a gradient; 0: any"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: one a core)")
    parser.add_argument("--plot", type=Path, help="with --data: write accuracy against bytes, a .png or .svg")
    given = parser.parse_args(arguments)
    given.models = given.models.split(",")
    given.codecs = given.codecs.split(",") if given.codecs else None
    try:
        for codec in given.codecs or ():
            check_codec(codec)
        for name in given.models:
            Config(model=name, clip=given.clip)
    except ConfigError as error:
        parser.error(str(error))
    for key in ("seeds", "rounds", "jobs"):
        if getattr(given, key) < 1:
            parser.error(f"--{key}={getattr(given, key)} is not allowed; allowed: >= 1")
    if given.data is not None and not given.data.is_file():
        parser.error(f"--data={given.data}: there is no such file")
    return given


def bytes_of(name: str, codecs: Sequence[str]) -> list[Row]:
    """A reply of this model by each codec, beside that of FedAvg."""
    torch.manual_seed(0)
    model = build_model(name, _SHAPE, _CLASSES, 0)
    optimizer = FOOF(model, lr=0.01, damping=1.0)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(_BATCH, *_SHAPE)), torch.randint(_CLASSES, (_BATCH,))).backward()
        optimizer.step()
    plain = _reply_bytes(model, None)
    return [_row_of_bytes(name, model, optimizer, codec, plain) for codec in codecs]


def _row_of_bytes(name: str, model: nn.Module, optimizer: FOOF, codec: str, plain: int) -> Row:
    state = model.state_dict()
    started = time.perf_counter()
    payload = encode(optimizer.preconditioners(), codec, state)
    encoded = time.perf_counter()
    layers = decode(payload, {key: tuple(value.shape) for key, value in state.items()})
    decoded = time.perf_counter()
    return {
        "model": name,
        "codec": codec,
        "uplink_ratio": rounded(_reply_bytes(model, payload) / plain),
        "layers": len(layers),
        "encode_seconds": rounded(encoded - started),
        "decode_seconds": rounded(decoded - encoded),
    }


def _reply_bytes(model: nn.Module, payload: bytes | None) -> int:
    """Of the records that a client's reply holds."""
    # Imported here: in the processes of the runs Flower's logger keeps the stderr that it finds.
    from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

    from fedpm_flwr import messages

    metrics = MetricRecord({messages.NUM_EXAMPLES: 1})
    content = RecordDict({messages.ARRAYS: ArrayRecord(model.state_dict()), messages.METRICS: metrics})
    if payload is not None:
        curvature = ConfigRecord({messages.PAYLOAD: payload, messages.VERSION: __version__})
        content[messages.CURVATURE] = curvature
    return messages.count_bytes(content)


def configs(given: argparse.Namespace, codecs: Sequence[str], folder: Path) -> dict[str, list[Config]]:
    """The runs of every row, seed by seed."""
    base = Config(
        dataset=f"npz:{given.data.absolute()}",
        max_train_examples=10_000,
        model="lenet",
        num_server_rounds=given.rounds,
        batch_size=64,
        damping=1.0,
        refresh_interval=5,
        inverse_interval=10,
        learning_rate=0.3,
        clip=given.clip,
        min_available_nodes=_NODES,
        device="cpu",
    )
    rows = {codec: replace(base, codec=codec) for codec in codecs}
    rows["localnewton"] = replace(base, algorithm="localnewton")
    rows["fedavg"] = replace(base, algorithm="fedavg")
    return {
        label: [replace(one, seed=seed, output=str(folder / f"{label}-{seed}")) for seed in range(given.seeds)]
        for label, one in rows.items()
    }


def trained(
    label: str, runs: Sequence[Rounds], full: Sequence[Rounds] | None, costs: Row | None, seeds: int
) -> Row:
    """One row, of a codec or of a method that sends no curvature; without figures if some seeds failed."""
    failed = seeds - len(runs)
    base: dict[str, str | int | float | None] = {
        "model": "lenet",
        "method": label if costs is None else "fedpm",
        "codec": None if costs is None else label,
        "uplink_ratio": 1.0 if costs is None else costs["uplink_ratio"],
        "failed": failed,
    }
    if failed:
        return {**base, "accuracy": None}
    accuracies = [_last(run) for run in runs]
    minus = [100 * (own - _last(other)) for own, other in zip(accuracies, full, strict=True)] if full else []
    several = len(runs) > 1
    return {
        **base,
        "accuracy": rounded(statistics.fmean(accuracies)),
        "accuracy_std": rounded(statistics.stdev(accuracies)) if several else None,
        "minus_full": rounded(statistics.fmean(minus)) if minus else None,
        "standard_error": rounded(statistics.stdev(minus) / len(minus) ** 0.5) if minus and several else None,
        "uplink_mb": rounded(statistics.fmean(_megabytes(run)[-1] for run in runs)),
        "seconds": rounded(statistics.fmean(sum(one["seconds"] for one in run) for run in runs)),
    }


def panel(runs: Mapping[str, Sequence[Rounds]]) -> Panel:
    """Mean test accuracy against the bytes sent until then, a line a row."""
    lines = {}
    for label, found in runs.items():
        accuracies = [statistics.fmean(run[i]["test-accuracy"] for run in found) for i in range(len(found[0]))]
        lines[label] = Line(_megabytes(found[0])[1:], accuracies[1:])
    y = "test accuracy, mean over seeds"
    return Panel(title="", x="MB from clients to server", y=y, decades=None, lines=lines)


def _megabytes(run: Rounds) -> list[float]:
    """Sent by all clients up to each round."""
    sent = [sum(one["uplink-bytes"] for one in run[: i + 1]) / 1e6 for i in range(len(run))]
    return sent


def _last(run: Rounds) -> float:
    return run[-1]["test-accuracy"]


if __name__ == "__main__":
    sys.exit(main())
