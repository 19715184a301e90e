"""Which client optimizer and which strategy make an algorithm. A new one is one line in ``REGISTRY``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .config import Config
from .guarded import Guarded
from .optim import FOOF, KFAC, LTDA, Newton, Sophia
from .strategy import FedPM


@dataclass(frozen=True)
class Algorithm:
    """``optimizer(config, model, codec)`` for the client, ``strategy(config)`` for the server.

    The codec is given in rounds of one local step, where the client steps by the curvature as decoded.
    ``without_effect`` are settings that neither of them reads, and ``reads_optimizer`` says whether the
    client's optimizer is the one that the setting ``optimizer`` names.
    """

    optimizer: Callable[[Config, nn.Module, str | None], torch.optim.Optimizer]
    strategy: Callable[[Config], Guarded]
    without_effect: tuple[str, ...] = ()
    reads_optimizer: bool = True


def get_algorithm(name: str) -> Algorithm:
    """The algorithm of this name, one of ``config.ALGORITHMS``."""
    return REGISTRY[name]


def settings_without_effect(config: Config) -> list[str]:
    """A line for each setting that was given another value than its default and that nothing reads."""
    given, default = config.to_run_config(), Config().to_run_config()
    algorithm = get_algorithm(config.algorithm)
    if algorithm.reads_optimizer:
        reader, read = f"optimizer={config.optimizer!r}", OPTIMIZERS[config.optimizer].reads
    else:
        reader, read = f"algorithm={config.algorithm!r}", _SGD
    unread = [(key, f"algorithm={config.algorithm!r}") for key in algorithm.without_effect]
    unread += [(key, reader) for key in _OPTIMIZER_SETTINGS if key not in read]
    return [
        f"{key}={given[key]!r} has no effect: {who} does not read it"
        for key, who in unread
        if given[key] != default[key]
    ]


@dataclass(frozen=True)
class _Optimizer:
    make: Callable[[Config, nn.Module, str | None], torch.optim.Optimizer]
    reads: tuple[str, ...]


def _steps(config: Config, codec: str | None) -> dict[str, Any]:
    """The settings that all second-order optimizers share."""
    return {
        "lr": config.learning_rate,
        "plain_lr": config.plain_learning_rate or None,
        "momentum": config.momentum,
        "weight_decay": config.weight_decay,
        "clip": config.clip,
        "refresh_interval": config.refresh_interval,
        "codec": codec,
    }


def _inverted(config: Config, codec: str | None) -> dict[str, Any]:
    """The settings of those that invert a damped running average."""
    return _steps(config, codec) | {
        "damping": config.damping,
        "relative_damping": config.relative_damping,
        "decoupled_weight_decay": config.decoupled_weight_decay,
        "ema": config.ema,
        "inverse_interval": config.inverse_interval,
    }


def _layerwise(config: Config, codec: str | None) -> dict[str, Any]:
    """The settings of those whose P is of a layer's inputs."""
    sides = {"max_factor_side": config.max_factor_side, "position_stride": config.position_stride}
    return _inverted(config, codec) | sides


def _foof(config: Config, model: nn.Module, codec: str | None) -> torch.optim.Optimizer:
    return FOOF(model, **_layerwise(config, codec))


def _kfac(config: Config, model: nn.Module, codec: str | None) -> torch.optim.Optimizer:
    return KFAC(model, fisher=config.fisher, seed=config.seed, **_layerwise(config, codec))


def _sophia(config: Config, model: nn.Module, codec: str | None) -> torch.optim.Optimizer:
    return Sophia(model, gamma=config.sophia_gamma, seed=config.seed, **_steps(config, codec))


def _ltda(config: Config, model: nn.Module, codec: str | None) -> torch.optim.Optimizer:
    return LTDA(model, **_inverted(config, codec))


def _newton(config: Config, model: nn.Module, codec: str | None) -> torch.optim.Optimizer:
    return Newton(model, max_factor_side=config.max_factor_side, **_inverted(config, codec))


_SGD = ("momentum", "weight-decay")
_STEPS = (*_SGD, "optimizer", "plain-learning-rate", "clip", "refresh-interval")
_INVERTED = (*_STEPS, "damping", "relative-damping", "decoupled-weight-decay", "ema", "inverse-interval")
_LAYERWISE = (*_INVERTED, "max-factor-side", "position-stride")

OPTIMIZERS = {
    "foof": _Optimizer(_foof, _LAYERWISE),
    "kfac": _Optimizer(_kfac, (*_LAYERWISE, "fisher", "kronecker-sum")),
    "sophia": _Optimizer(_sophia, (*_STEPS, "sophia-gamma")),
    "ltda": _Optimizer(_ltda, _INVERTED),
    "newton": _Optimizer(_newton, (*_INVERTED, "max-factor-side")),
}
"""What ``optimizer`` names, and the settings that each reads."""

_OPTIMIZER_SETTINGS = tuple(dict.fromkeys(key for optimizer in OPTIMIZERS.values() for key in optimizer.reads))


def _second_order(config: Config, model: nn.Module, codec: str | None) -> torch.optim.Optimizer:
    return OPTIMIZERS[config.optimizer].make(config, model, codec)


def _sgd(config: Config, model: nn.Module, codec: str | None) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        model.parameters(), lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
    )


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
        kronecker_sum=config.kronecker_sum,
        **_rounds(config),
    )


_MIXING = ("server-learning-rate", "weighting", "codec")

REGISTRY = {
    "fedpm": Algorithm(_second_order, _fedpm),
    "localnewton": Algorithm(_second_order, _fedavg, (*_MIXING, "kronecker-sum")),
    "fedavg": Algorithm(_sgd, _fedavg, _MIXING, reads_optimizer=False),
}
