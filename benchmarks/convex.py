"""The theory on real data: L2-regularised logistic regression, many clients, distance to the optimum by rounds.

    python -m benchmarks.convex --data FOLDER [--methods fedpm:1,fedpm:3,…] [--backend ray]

FOLDER holds the LIBSVM files a9a (80 clients, d = 123) and w8a (142 clients, d = 300); without it, breast cancer
from scikit-learn (10 clients, d = 30). Clients hold consecutive parts of the data as it lies. All in float64, from
θ = 0, with the whole local gradient in every step, and for the second-order methods with exact Hessians, through
the application's own ServerApp and ClientApp. θ* is scikit-learn's solution, refined by Newton's method.

A method is a name of ``algorithm=`` with its local steps K. ``fedavg:1`` is distributed gradient descent. Columns:
rounds until ‖θ − θ*‖ is below 1e-3, 1e-6, 1e-10; floor, the least distance of all rounds; last, that of the last
round; order, the median of log e₍ₜ₊₁₎ / log eₜ while 1e-13 < e₍ₜ₊₁₎ and eₜ < 0.5 (more than 1: superlinear); MB
from clients to server in all rounds, and seconds, with other runs beside it.
"""

import argparse
import itertools
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from torch import nn

from fedpm_flwr.config import ALGORITHMS, Config
from fedpm_flwr.objective import Objective
from fedpm_flwr.tasks import build_model, client_data, load_dataset
from fedpm_flwr.training import loader

from .arguments import make_parser
from .on_ray import run_on_ray
from .panels import Line, Panel, plot_panels
from .runs import Rounds, run_all
from .table import Row, publish, rounded

CLIENTS = {"a9a": 80, "w8a": 142, "breast-cancer": 10}
THRESHOLDS = ("1e-3", "1e-6", "1e-10")
_DEFAULT_METHODS = (
    "fedpm:1,fedpm:3,fedpm:5,fedpm-corrected:3,fedpm-corrected:5,localnewton:1,localnewton:3,localnewton:5,"
    "fednl:1,fedavg:5,fedavg:1"
)
_L2 = 1e-3
_NEWTON: dict[str, Any] = {
    "optimizer": "newton",
    "learning_rate": 1.0,
    "damping": 0.0,
    "ema": 0.0,
    "refresh_interval": 1,
    "inverse_interval": 1,
    "codec": "triangle-float64",
}
_FOOT = (
    "rounds until the distance to the optimum is below 1e-3, 1e-6, 1e-10; floor: the least distance of all "
    "rounds, last: the last round's; order: of convergence, 1 linear, 2 quadratic"
)
_FIRST_ORDER = ("fedavg",)
_SHOWN = (1e-16, 1e3)
"""Distances in the picture: what diverges leaves it."""
_LEAST, _LARGEST = 1e-13, 0.5
"""Distances that the order of convergence is read from."""


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parse(arguments)
    rows: list[Row] = []
    panels: list[Panel] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in given.datasets:
            base = replace(
                prepare(name, given.data, Path(folder) / name),
                num_server_rounds=given.rounds,
                seed=given.seed,
                fraction_train=given.participation,
            )
            configs = [configure(base, method, steps) for method, steps in given.methods]
            on_ray = given.backend == "ray"
            done = run_on_ray(configs, CLIENTS[name]) if on_ray else run_all(configs, CLIENTS[name], given.jobs)
            complete = [config for config in configs if config.output in done]
            rows += [row(name, config, done[config.output]) for config in complete]
            lines = {}
            for config in complete:
                own = done[config.output]
                line = Line([int(one["round"]) for one in own], [one["distance"] for one in own])
                lines[f"{config.algorithm} K={config.local_steps}"] = line
            title = f"{name}, {CLIENTS[name]} clients"
            panels.append(Panel(title=title, x="round", y="distance to the optimum", decades=_SHOWN, lines=lines))
    asked = {key: getattr(given, key) for key in ("rounds", "participation", "backend", "seed")}
    publish("convex", rows, given.output, _FOOT, **asked, curves=panels)
    if given.plot:
        plot_panels(panels, given.plot)
    return 0 if len(rows) == len(given.datasets) * len(given.methods) else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("convex", __doc__)
    parser.add_argument("--data", type=Path, help="folder with a9a and w8a; default: breast cancer instead")
    parser.add_argument("--datasets", help=f"of {', '.join(CLIENTS)}; default: those that --data has")
    parser.add_argument("--methods", default=_DEFAULT_METHODS, help="ALGORITHM:K, joined by commas")
    parser.add_argument("--rounds", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--participation", type=float, default=1.0, help="share of the clients in a round")
    parser.add_argument("--backend", choices=("inline", "ray"), default="inline", help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: one a core)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling of clients (default: 0)")
    parser.add_argument("--plot", type=Path, help="write the picture, a .png or .svg")
    given = parser.parse_args(arguments)
    given.datasets = (
        given.datasets.split(",") if given.datasets else ["a9a", "w8a"] if given.data else ["breast-cancer"]
    )
    if not set(given.datasets) <= set(CLIENTS):
        parser.error(f"--datasets={','.join(given.datasets)}; allowed, joined by commas: {', '.join(CLIENTS)}")
    methods = [method.partition(":")[::2] for method in given.methods.split(",")]
    if not all(name in ALGORITHMS and steps.isdecimal() and int(steps) for name, steps in methods):
        parser.error(f"--methods={given.methods}; allowed, joined by commas: NAME:K, of {', '.join(ALGORITHMS)}")
    given.methods = [(name, int(steps)) for name, steps in methods]
    for name in given.datasets:
        if name != "breast-cancer" and not (given.data and (given.data / name).is_file()):
            parser.error(f"--data={given.data}: there is no file {name} in it")
    for key in ("rounds", "jobs"):
        if getattr(given, key) < 1:
            parser.error(f"--{key}={getattr(given, key)} is not allowed; allowed: >= 1")
    if not 0 < given.participation <= 1:
        parser.error(f"--participation={given.participation} is not allowed; allowed: > 0 and <= 1")
    return given


def prepare(name: str, data: Path | None, folder: Path) -> Config:
    """The problem as a configuration, its θ* beside it; all of a LIBSVM file is trained on."""
    folder.mkdir(parents=True)
    dataset = name
    if name != "breast-cancer":
        assert data is not None
        for link in (name, f"{name}.t"):  # as the test set too: else a part of the file would be held out
            (folder / link).symlink_to((data / name).absolute())
        dataset = f"libsvm:{folder / name}"
    config = Config(
        dataset=dataset,
        model="logistic",
        dtype="float64",
        partition="contiguous",
        weight_decay=_L2,
        batch_size=0,
        min_available_nodes=CLIENTS[name],
        reference_model=str(folder / "optimum.safetensors"),
        device="cpu",
    )
    save_file(dict(optimum(config).state_dict()), config.reference_model)
    return config


def optimum(config: Config) -> nn.Module:
    """The minimiser of the mean loss of all training examples + ω/2 ‖θ‖², to a gradient of 1e-14."""
    train = load_dataset(config.dataset).train
    inputs, labels = train.inputs.double(), train.labels
    scale = 1 / (config.weight_decay * len(labels))  # scikit-learn's C: it sums where we average
    solver = LogisticRegression(C=scale, fit_intercept=False, solver="newton-cholesky", tol=1e-8, max_iter=200)
    solver.fit(inputs.numpy(), labels.numpy())
    model = build_model(config.model, train.input_shape, 2, config.seed).double()
    objective = Objective(model, [(inputs, labels)], F.cross_entropy, config.weight_decay)
    objective.move_to(torch.from_numpy(np.ravel(solver.coef_)))
    for _ in range(3):
        objective.move_to(objective.theta - torch.linalg.solve(objective.hessian(), objective.gradient()))
    slope = float(objective.gradient().norm())
    if not slope < 1e-14:
        raise RuntimeError(f"the optimum of {config.dataset} was not found: the gradient is {slope:.1e}")
    return model


def configure(base: Config, method: str, steps: int) -> Config:
    """One run. First-order methods step by 1/L, L being the largest curvature of a client's loss anywhere."""
    settings = {**_NEWTON, "learning_rate": 1 / largest_curvature(base)} if method in _FIRST_ORDER else _NEWTON
    output = Path(base.reference_model).parent / f"{method}-{steps}"
    return replace(base, **settings, algorithm=method, local_steps=steps, output=str(output))


def largest_curvature(config: Config) -> float:
    """L = max over clients of λ_max(XᵀX / 4n) + ω."""
    clients = CLIENTS[Path(config.dataset.partition(":")[2] or config.dataset).name]
    parts = (client_data(config, i, clients) for i in range(clients))
    inputs = (next(iter(loader(part, 0)))[0].double() for part in parts)
    return max(float(torch.linalg.matrix_norm(x, 2)) ** 2 / (4 * len(x)) for x in inputs) + config.weight_decay


def row(dataset: str, config: Config, rounds: Rounds) -> Row:
    """One method on one data set."""
    errors = [one["distance"] for one in rounds]
    return {
        "dataset": dataset,
        "method": config.algorithm,
        "local_steps": config.local_steps,
        **{
            f"rounds_to_{threshold}": next((i for i, e in enumerate(errors) if e < float(threshold)), None)
            for threshold in THRESHOLDS
        },
        "floor": rounded(min(errors[1:])),
        "last": rounded(errors[-1]),
        "order": order(errors),
        "uplink_mb": rounded(sum(one["uplink-bytes"] for one in rounds) / 1e6),
        "seconds": rounded(sum(one["seconds"] for one in rounds)),
    }


def order(errors: Sequence[float]) -> float | None:
    """The observed order of convergence; None: never both near and far enough.

    >>> order([1.0, 1e-1, 1e-2, 1e-4, 1e-8, 1e-16])
    2.0
    """
    pairs = [(a, b) for a, b in itertools.pairwise(errors) if a < _LARGEST and b > _LEAST]
    ratios = [math.log(b) / math.log(a) for a, b in pairs]
    return rounded(statistics.median(ratios)) if ratios else None


if __name__ == "__main__":
    sys.exit(main())
