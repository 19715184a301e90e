"""The client's optimizers by name, made from the configuration. A new one is one line in ``OPTIMIZERS``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .config import Config
from .optim import FOOF, KFAC, LTDA, Newton, SecondOrder, Sophia


@dataclass(frozen=True)
class NamedOptimizer:
    """``make(config, model, codec, seed)``, and the settings that it reads.

    The codec is given in rounds of one local step, where the client steps by the curvature as decoded.
    """

    make: Callable[[Config, nn.Module, str | None, int], SecondOrder]
    reads: tuple[str, ...]


def second_order(
    config: Config, model: nn.Module, codec: str | None = None, *, name: str | None = None, seed: int | None = None
) -> SecondOrder:
    """The optimizer of this name and with this seed, by default those of the settings."""
    return OPTIMIZERS[name or config.optimizer].make(config, model, codec, config.seed if seed is None else seed)


def sgd(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """Plain gradient steps, by the gradient of the loss shortened to the norm ``clip``, if that is not 0.

    What is added to gradients later (``correct_gradients``) is not shortened: of SCAFFOLD, the variates are means
    of shortened gradients.
    """
    optimizer = torch.optim.SGD(
        model.parameters(), lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
    )
    if config.clip:
        parameters = list(model.parameters())

        def shorten(*_: Any) -> None:
            nn.utils.clip_grad_norm_(parameters, config.clip)

        optimizer.register_step_pre_hook(shorten)
    return optimizer


SGD_READS = ("learning-rate", "local-epochs", "local-steps", "momentum", "weight-decay", "clip")


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


def _foof(config: Config, model: nn.Module, codec: str | None, seed: int) -> SecondOrder:
    return FOOF(model, **_layerwise(config, codec))


def _kfac(config: Config, model: nn.Module, codec: str | None, seed: int) -> SecondOrder:
    return KFAC(model, fisher=config.fisher, seed=seed, class_dim=1, **_layerwise(config, codec))


def _sophia(config: Config, model: nn.Module, codec: str | None, seed: int) -> SecondOrder:
    return Sophia(model, gamma=config.sophia_gamma, seed=seed, class_dim=1, **_steps(config, codec))


def _ltda(config: Config, model: nn.Module, codec: str | None, seed: int) -> SecondOrder:
    return LTDA(model, **_inverted(config, codec))


def _newton(config: Config, model: nn.Module, codec: str | None, seed: int) -> SecondOrder:
    return Newton(model, max_factor_side=config.max_factor_side, **_inverted(config, codec))


_STEPS = (*SGD_READS, "optimizer", "plain-learning-rate", "refresh-interval")
_INVERTED = (*_STEPS, "damping", "relative-damping", "decoupled-weight-decay", "ema", "inverse-interval")
_LAYERWISE = (*_INVERTED, "max-factor-side", "position-stride")

OPTIMIZERS = {
    "foof": NamedOptimizer(_foof, _LAYERWISE),
    "kfac": NamedOptimizer(_kfac, (*_LAYERWISE, "fisher")),
    "sophia": NamedOptimizer(_sophia, (*_STEPS, "sophia-gamma")),
    "ltda": NamedOptimizer(_ltda, _INVERTED),
    "newton": NamedOptimizer(_newton, (*_INVERTED, "max-factor-side")),
}
"""What ``optimizer`` names, and the settings that each reads."""
