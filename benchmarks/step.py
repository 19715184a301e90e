"""Time and memory of a training step: our optimizers beside torch's SGD and Adam.

    python -m benchmarks.step [--models lenet,resnet18-gn,vit] [--methods sgd,adam,foof,…] [--threads 2] …

A step is forward, loss, backward and step, on one batch of random images of CIFAR's size. Each method
has a process of its own, on its own copy of the model, and the methods take turns: one steps at a time.

A cycle of many steps with few measurements of curvature and fewer inversions is not run as a whole:
plain, refreshing and inverting steps are timed each for itself, and averaged by their shares of a cycle.

Columns: step_ratio, the time of a step over that of SGD, median over the rounds of turns, and spread, the
largest minus the least over these rounds; least_ratio, the same by the fastest step of each kind, which a busy
machine disturbs less; step_ms, plain_ms, refresh_ms, inverting_ms, the time of a step on
average and of each kind (median); peak_mb, the most memory that the process takes beyond its libraries, on
CUDA that of torch's tensors.
"""

import multiprocessing
import resource
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fedpm_flwr.config import MODELS
from fedpm_flwr.optim import FOOF, KFAC, LTDA, Sophia
from fedpm_flwr.report import PREFIX
from fedpm_flwr.tasks import build_model

from .arguments import make_parser
from .table import Row, publish, rounded

INPUT_SHAPE, CLASSES = (3, 32, 32), 10
_NOT_FOR_IMAGES = ("char-lm", "logistic")
REFRESH, INVERSE = 10, 100
"""The intervals that steps are timed at; the shares that they are averaged by are another matter."""
_LR = 1e-3
_SHORT = 0.5
"""Plain steps of a turn are several, for about so many seconds."""
_INTERVALS: dict[str, Any] = {"refresh_interval": REFRESH, "inverse_interval": INVERSE}

METHODS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=_LR),
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=_LR),
    "foof": partial(FOOF, lr=_LR, **_INTERVALS),
    "foof-stride2": partial(FOOF, lr=_LR, position_stride=2, **_INTERVALS),
    "kfac": partial(KFAC, lr=_LR, **_INTERVALS),
    "sophia": partial(Sophia, lr=_LR, refresh_interval=REFRESH),
    "ltda": partial(LTDA, lr=_LR, **_INTERVALS),
}
_DEFAULT_METHODS = "sgd,adam,foof,foof-stride2,kfac,sophia"
Times = dict[str, list[float]]
"""Seconds of the steps of each kind: plain, refresh, inverting."""


@dataclass(frozen=True)
class Case:
    """What a process steps."""

    device: str
    model: str
    method: str
    batch_size: int
    threads: int
    seed: int


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("step", __doc__)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--devices", default=",".join(devices), help="default: %(default)s")
    parser.add_argument("--models", default="lenet,resnet18-gn,vit", help="default: %(default)s")
    parser.add_argument("--methods", default=_DEFAULT_METHODS, help=f"of {', '.join(METHODS)}; SGD always is one")
    parser.add_argument("--batch-size", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--refresh", type=int, default=REFRESH, help="steps between measurements, for the average")
    parser.add_argument("--inverse", type=int, default=INVERSE, help="steps between inversions, for the average")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of turns (default: %(default)s)")
    parser.add_argument("--inversions", type=int, default=1, help="rounds with an inverting step (default: 1)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the model and its inputs (default: 0)")
    given = parser.parse_args(arguments)
    methods = ["sgd", *(name for name in given.methods.split(",") if name != "sgd")]
    for key, names, allowed in (
        ("devices", given.devices.split(","), devices),
        ("models", given.models.split(","), [name for name in MODELS if name not in _NOT_FOR_IMAGES]),
        ("methods", methods, METHODS),
    ):
        if not set(names) <= set(allowed):
            parser.error(f"--{key}={getattr(given, key)}; allowed, joined by commas: {', '.join(allowed)}")
    for key in ("batch_size", "refresh", "inverse", "repeats", "inversions", "threads"):
        if getattr(given, key) < 1:
            parser.error(f"--{key.replace('_', '-')}={getattr(given, key)} is not allowed; allowed: >= 1")
    if given.inverse % given.refresh:
        parser.error(f"--inverse={given.inverse} is not a multiple of --refresh={given.refresh}")
    shares = {
        "plain": 1 - 1 / given.refresh,
        "refresh": 1 / given.refresh - 1 / given.inverse,
        "inverting": 1 / given.inverse,
    }
    rows: list[Row] = []
    for device in given.devices.split(","):
        for model in given.models.split(","):
            cases = [
                Case(device, model, method, given.batch_size, given.threads, given.seed) for method in methods
            ]
            rows += measure(cases, shares, given.repeats, given.inversions)
    foot = "a step on average: " + " + ".join(f"{share:.3g} {kind}" for kind, share in shares.items())
    more = {"batch_size": given.batch_size, "threads": given.threads, "shares": shares}
    publish("step", rows, given.output, foot, **more)
    wanted = len(given.devices.split(",")) * len(given.models.split(",")) * len(methods)
    return 0 if len(rows) == wanted else 1


def measure(cases: Sequence[Case], shares: dict[str, float], repeats: int, inversions: int) -> list[Row]:
    """One row a case that can be run; the first is what the others are compared with."""
    with ExitStack() as stack:
        started = [(case, stack.enter_context(_working(case))) for case in cases]
        running: list[tuple[Case, Connection]] = []
        for case, worker in started:
            name = f"{case.device} {case.model} {case.method}"
            print(f"{PREFIX}warming up: {name}", file=sys.stderr, flush=True)
            try:
                _ask(worker, 0)  # the first step: it measures and inverts
            except EOFError:
                if case is cases[0]:
                    raise
                print(f"{PREFIX}left out of the table, since it failed: {name}", file=sys.stderr, flush=True)
            else:
                running.append((case, worker))
        cases, workers = [case for case, _ in running], [worker for _, worker in running]
        rounds: list[list[Times]] = [[] for _ in cases]
        for number in range(repeats):
            print(f"{PREFIX}round {number + 1}/{repeats}", file=sys.stderr, flush=True)
            for times, worker in zip(rounds, workers, strict=True):
                times.append(_ask(worker, REFRESH))
        for _ in range(inversions):
            for times, worker in zip(rounds, workers, strict=True):
                times[0]["inverting"] += _ask(worker, INVERSE)["inverting"]
        peaks = [_ask(worker, None)["peak_mb"][0] for worker in workers]
    return [
        _row(case, shares, times, rounds[0], peak) for case, times, peak in zip(cases, rounds, peaks, strict=True)
    ]


def _averages(rounds: Sequence[Times], shares: dict[str, float]) -> list[float]:
    """Seconds of a step on average, round by round; an inverting step's are the same for all of them."""
    inverting = statistics.median(rounds[0]["inverting"])
    return [
        sum(
            share * (inverting if kind == "inverting" else statistics.median(times[kind]))
            for kind, share in shares.items()
        )
        for times in rounds
    ]


def _least(rounds: Sequence[Times], shares: dict[str, float]) -> float:
    """Seconds of a step on average by the fastest step of each kind."""
    return sum(share * min(min(times[kind]) for times in rounds if times[kind]) for kind, share in shares.items())


def _row(case: Case, shares: dict[str, float], rounds: Sequence[Times], sgd: Sequence[Times], peak: float) -> Row:
    own = _averages(rounds, shares)
    ratios = [a / b for a, b in zip(own, _averages(sgd, shares), strict=True)]

    def milliseconds(kind: str) -> float:
        return rounded(1e3 * statistics.median(seconds for times in rounds for seconds in times[kind]))

    return {
        "device": case.device,
        "model": case.model,
        "method": case.method,
        "step_ratio": rounded(statistics.median(ratios)),
        "spread": rounded(max(ratios) - min(ratios)),
        "least_ratio": rounded(_least(rounds, shares) / _least(sgd, shares)),
        "step_ms": rounded(1e3 * statistics.median(own)),
        **{f"{kind}_ms": milliseconds(kind) for kind in ("plain", "refresh", "inverting")},
        "peak_mb": rounded(peak),
    }


@contextmanager
def _working(case: Case) -> Iterator[Connection]:
    """A process that steps this case, one request after another."""
    # Forked from a server that has imported everything but computed nothing: soon there, and without threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "fedpm_flwr.optim", "fedpm_flwr.tasks"])
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(case, there), daemon=True)
    process.start()
    there.close()
    try:
        yield here
    finally:
        here.close()
        process.join(timeout=10)
        process.kill()


def _ask(worker: Connection, number: int | None) -> Times:
    worker.send(number)
    times: Times = worker.recv()
    return times


def _serve(case: Case, requests: Connection) -> None:
    """Step to each number that is asked for, and tell the times of it; asked for None, tell the peak memory."""
    libraries = _peak_rss_mb()
    torch.set_num_threads(case.threads)
    model = build_model(case.model, INPUT_SHAPE, CLASSES, case.seed).to(case.device)
    generator = torch.Generator().manual_seed(case.seed)
    images = torch.randn(case.batch_size, *INPUT_SHAPE, generator=generator).to(case.device)
    targets = torch.randint(CLASSES, (case.batch_size,), generator=generator).to(case.device)
    warnings.filterwarnings("ignore", "no curvature for")
    optimizer = METHODS[case.method](model)
    scheduled = [
        group for group in optimizer.param_groups if "step" in group
    ]  # SGD and Adam have plain steps alone
    plain = 1
    while True:
        try:
            number = requests.recv()
        except EOFError:
            return
        if number is None:
            peak = torch.cuda.max_memory_allocated() / 1e6 if images.is_cuda else _peak_rss_mb() - libraries
            requests.send({"peak_mb": [peak]})
            continue
        # Before it a step to be warm after the others' turns, and plain ones.
        start = max(number - plain - 1, 0)
        for group in scheduled:
            group["step"] = start
        times: Times = defaultdict(list)
        for at in range(start, number + 1):
            seconds = _step(model, optimizer, images, targets)
            if at == number and scheduled:
                times["refresh" if number % INVERSE else "inverting"].append(seconds)
            elif at > start:
                times["plain"].append(seconds)
                plain = max(1, min(int(_SHORT / seconds), REFRESH - 3))
        if not scheduled:
            times["refresh"], times["inverting"] = list(times["plain"]), list(times["plain"])
        requests.send(times)


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, targets: torch.Tensor
) -> float:
    """Seconds of one step."""
    _wait_for(images)
    started = time.perf_counter()
    optimizer.zero_grad()
    outputs = model(images)
    loss = F.cross_entropy(outputs, targets)
    if hasattr(optimizer, "measure"):
        optimizer.measure(loss, outputs)
    loss.backward()
    optimizer.step()
    _wait_for(images)
    return time.perf_counter() - started


def _wait_for(tensor: torch.Tensor) -> None:
    """Until the device has done all that it was asked."""
    if tensor.is_cuda:
        torch.cuda.synchronize()


def _peak_rss_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


if __name__ == "__main__":
    sys.exit(main())
