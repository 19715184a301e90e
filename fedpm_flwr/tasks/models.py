"""Models by name. A new one is one function and one line in ``_MODELS``."""

import math
from collections.abc import Callable

import torch
from torch import nn


def build_model(name: str, input_shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
    """A freshly initialised model: the same for the same seed.

    Raises:
        KeyError: the name is not one of ``config.MODELS``.
        ValueError: the model cannot take inputs of this shape.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _MODELS[name](input_shape, classes)


def _cnn(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Two convolutions 3 × 3 with pooling, two fully connected layers."""
    if len(input_shape) != 3 or min(input_shape[1:]) < 4:
        raise ValueError(f"model='cnn' takes images of at least 4 x 4, not inputs of shape {input_shape}")
    channels, height, width = input_shape
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (height // 4) * (width // 4), 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )


def _mlp(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """One hidden layer of 64 units, on inputs of any shape."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), 64), nn.ReLU(), nn.Linear(64, classes))


_MODELS: dict[str, Callable[[tuple[int, ...], int], nn.Module]] = {"cnn": _cnn, "mlp": _mlp}
