"""Which client optimizer and which strategy make an algorithm. A new one is one line in ``REGISTRY``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .config import Config
from .guarded import Guarded
from .optim import FOOF
from .strategy import FedPM


@dataclass(frozen=True)
class Algorithm:
    """``optimizer(config, model, codec)`` for the client, ``strategy(config)`` for the server.

    The codec is given in rounds of one local step, where the client steps by the curvature as decoded.
    ``without_effect`` are the settings that neither of them reads.
    """

    optimizer: Callable[[Config, nn.Module, str | None], torch.optim.Optimizer]
    strategy: Callable[[Config], Guarded]
    without_effect: tuple[str, ...] = ()


def get_algorithm(name: str) -> Algorithm:
    """The algorithm of this name, one of ``config.ALGORITHMS``."""
    return REGISTRY[name]


def settings_without_effect(config: Config) -> list[str]:
    """A line for each setting that was given another value than its default and that nothing reads."""
    given, default = config.to_run_config(), Config().to_run_config()
    unread = get_algorithm(config.algorithm).without_effect
    return [
        f"{key}={given[key]!r} has no effect: algorithm={config.algorithm!r} does not read it"
        for key in unread
        if given[key] != default[key]
    ]


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


def _rounds(config: Config) -> dict[str, Any]:
    """The settings that every strategy shares."""
    return {
        "fraction_train": config.fraction_train,
        "fraction_evaluate": config.fraction_evaluate,
        "min_train_nodes": 1,
        "min_evaluate_nodes": 1 if config.fraction_evaluate else 0,
        "min_available_nodes": config.min_available_nodes,
        "min_replies": config.min_replies,
        "max_failed_rounds": config.max_failed_rounds,
    }


def _fedavg(config: Config) -> Guarded:
    return Guarded(**_rounds(config))


def _fedpm(config: Config) -> Guarded:
    return FedPM(
        server_learning_rate=config.server_learning_rate,
        codec=config.codec,
        weighting=config.weighting,
        max_factor_side=config.max_factor_side,
        **_rounds(config),
    )


_MIXING = ("server-learning-rate", "weighting", "codec")
_CURVATURE = ("damping", "ema", "refresh-interval", "inverse-interval", "max-factor-side")

REGISTRY = {
    "fedpm": Algorithm(_foof, _fedpm),
    "localnewton": Algorithm(_foof, _fedavg, _MIXING),
    "fedavg": Algorithm(_sgd, _fedavg, _MIXING + _CURVATURE),
}
