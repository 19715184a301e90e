"""A parameter's change θᵢ − θ in fewer bits."""

import torch
from torch import Tensor

from .values import LARGEST

STORED = {"int8": torch.int8, "bfloat16": torch.int16}
"""The dtype in which a change travels by each codec; bfloat16 as its bits, since NumPy has no such numbers."""


def round_change(change: Tensor, codec: str) -> tuple[Tensor, float]:
    """What stands for a finite change, not empty, as a tensor of ``STORED`` dtype and the unit of its numbers."""
    if codec == "bfloat16":
        return change.to(torch.bfloat16).view(torch.int16), 1.0
    unit = float(change.abs().max().double() / LARGEST)
    return (change.double() / (unit or 1.0)).round().clamp(-LARGEST, LARGEST).to(torch.int8), unit


def read_change(stored: Tensor, unit: float, codec: str) -> Tensor:
    """The change again, in float64."""
    return stored.view(torch.bfloat16).double() if codec == "bfloat16" else stored.double() * unit
