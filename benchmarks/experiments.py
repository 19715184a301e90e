"""The paper's vision experiments (arXiv 2511.09100, Test 2): their settings, their methods, the data on disk.

Ten clients, all of them in every round, 5 local epochs, 100 rounds, Dirichlet 1.0 and 0.1. The paper does not tell
its CNN, learning rates, damping and batch size: here they are LeNet, batches of 64, and what ``benchmarks.tune``
found for each method.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fedpm_flwr.config import Config, ConfigError, Value

CONFIGS = Path(__file__).parent / "configs"
RESULTS = Path(__file__).parent / "results"
NODES = 10
ALPHAS = (1.0, 0.1)
TUNED_AT = 0.1
"""α of the partition that methods are tuned on."""
VALIDATION_SHARE, TRIAL_IMAGES, TRIAL_ROUNDS, TRIAL_SEED = 0.2, 5_000, 6, 100
"""Of a trial of ``benchmarks.tune``; the held-out images are the same for all seeds."""
_SHARED: Mapping[str, Value] = {
    "num-server-rounds": 100,
    "min-available-nodes": NODES,
    "local-epochs": 5,
    "batch-size": 64,
    "alpha": TUNED_AT,
}
_DATASETS: Mapping[str, Mapping[str, Value]] = {
    "cifar10": {"dataset": "cifar10", "model": "lenet"},
    "cifar100": {"dataset": "cifar100", "model": "resnet18-gn", "augment": True},
}
DATASETS = tuple(_DATASETS)
_SECOND_ORDER: Mapping[str, Value] = {"ema": 0.95, "refresh-interval": 5, "inverse-interval": 10}
_FIXED: Mapping[str, Mapping[str, Value]] = {
    "fedavg": {},
    "fedavgm": {},
    "fedprox": {},
    "scaffold": {},
    "fedadam": {},
    "ltda": _SECOND_ORDER,
    "fedsophia": {"refresh-interval": 5},
    "localnewton": _SECOND_ORDER,
    "fedpm": _SECOND_ORDER,
    "fedpm-corrected": _SECOND_ORDER,
}
ALGORITHMS = tuple(_FIXED)
"""Those that are tuned, each for itself."""
_PAPERS_METHODS = ("fedavg", "fedavgm", "fedprox", "scaffold", "fedadam", "localnewton", "fedpm")
METHODS = (*ALGORITHMS, "fedpm:auto")
"""Rows of the table: an algorithm, or with a colon FedPM by that codec, with the settings of ``fedpm``."""

PAPER: Mapping[tuple[str, float], Mapping[str, float]] = {
    (dataset, alpha): dict(zip(_PAPERS_METHODS, accuracies, strict=True))
    for (dataset, alpha), accuracies in {
        ("cifar10", 1.0): (0.701, 0.726, 0.701, 0.714, 0.704, 0.734, 0.748),
        ("cifar10", 0.1): (0.631, 0.648, 0.628, 0.653, 0.646, 0.624, 0.686),
        ("cifar100", 1.0): (0.598, 0.612, 0.566, 0.647, 0.583, 0.702, 0.684),
        ("cifar100", 0.1): (0.524, 0.549, 0.507, 0.582, 0.519, 0.619, 0.631),
    }.items()
}
"""Test accuracies of the paper, by data set and α, of the methods that it has."""


@dataclass(frozen=True)
class Version:
    """How much of an experiment is run: 0 images are all, 0 rounds and epochs as the experiment has them."""

    images: int = 0
    rounds: int = 0
    epochs: int = 0

    def of(self, config: Config) -> Config:
        """The experiment, this much of it."""
        return replace(
            config,
            max_train_examples=self.images,
            num_server_rounds=self.rounds or config.num_server_rounds,
            local_epochs=self.epochs or config.local_epochs,
        )


def base(dataset: str, algorithm: str) -> dict[str, Value]:
    """The settings of an experiment but for those that are tuned."""
    return {"algorithm": algorithm, **_DATASETS[dataset], **_SHARED, **_FIXED[algorithm]}


def configs_file(dataset: str, algorithm: str) -> Path:
    """The tuned settings, which ``flwr run --run-config`` takes too."""
    return CONFIGS / f"{dataset}-{algorithm}.toml"


def tuned(dataset: str, method: str) -> Config:
    """The experiment with a method of ``METHODS``, in full.

    Raises:
        ConfigError: the file is missing or not one of settings.
    """
    algorithm, _, codec = method.partition(":")
    path = configs_file(dataset, algorithm)
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}; python -m benchmarks.tune writes it") from error
    return Config.from_run_config(settings | ({"codec": codec} if codec else {}))


def located(config: Config, folder: Path | None) -> Config:
    """The same with the data of this folder, if it has a file DATASET.npz; else torchvision's."""
    path = folder / f"{config.dataset}.npz" if folder is not None else None
    return replace(config, dataset=f"npz:{path.absolute()}") if path is not None and path.is_file() else config
