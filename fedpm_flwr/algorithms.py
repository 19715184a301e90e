"""Which client optimizer and which strategy make an algorithm. A new one is one line in ``REGISTRY``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from flwr.serverapp.strategy import FedAvg
from torch import nn

from .config import Config
from .optim import FOOF
from .strategy import FedPM


@dataclass(frozen=True)
class Algorithm:
    """``optimizer(config, model, codec)`` for the client, ``strategy(config)`` for the server.

    The codec is given in rounds of one local step, where the client steps by the curvature as decoded.
    """

    optimizer: Callable[[Config, nn.Module, str | None], torch.optim.Optimizer]
    strategy: Callable[[Config], FedAvg]


def get_algorithm(name: str) -> Algorithm:
    """The algorithm of this name, one of ``config.ALGORITHMS``."""
    return REGISTRY[name]


def _foof(config: Config, model: nn.Module, codec: str | None) -> torch.optim.Optimizer:
    return FOOF(
        model,
        lr=config.learning_rate,
        damping=config.damping,
        ema=config.ema,
        refresh_interval=config.refresh_interval,
        inverse_interval=config.inverse_interval,
        max_factor_side=config.max_factor_side,
        codec=codec,
    )


def _sgd(config: Config, model: nn.Module, codec: str | None) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=config.learning_rate)


def _sampling(config: Config) -> dict[str, Any]:
    """The settings that every strategy derived from FedAvg shares."""
    return {
        "fraction_train": config.fraction_train,
        "fraction_evaluate": config.fraction_evaluate,
        "min_train_nodes": 1,
        "min_evaluate_nodes": 1 if config.fraction_evaluate else 0,
        "min_available_nodes": config.min_available_nodes,
    }


def _fedavg(config: Config) -> FedAvg:
    return FedAvg(**_sampling(config))


def _fedpm(config: Config) -> FedAvg:
    return FedPM(
        server_learning_rate=config.server_learning_rate,
        codec=config.codec,
        weighting=config.weighting,
        **_sampling(config),
    )


REGISTRY = {
    "fedpm": Algorithm(_foof, _fedpm),
    "localnewton": Algorithm(_foof, _fedavg),
    "fedavg": Algorithm(_sgd, _fedavg),
}
