"""What every codec of a part does."""

from collections.abc import Mapping
from typing import Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

Layout: TypeAlias = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""The dtype and shape of each tensor that stands for a part."""

_Value = TypeVar("_Value")


class PartCodec(Protocol):
    """A part of a curvature to named tensors and back."""

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Of a part of this shape.

        Raises:
            ValueError: this codec has no form for a part of this shape.
        """

    def pack(self, part: Tensor) -> dict[str, Tensor]:
        """The tensors that stand for the part, on the CPU."""

    def unpack(self, tensors: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """The part again, float32 or float64, from tensors of this ``layout``, whatever their numbers."""


def prefixed(prefix: str, tensors: Mapping[str, _Value]) -> dict[str, _Value]:
    """With ``prefix.`` before every name."""
    return {f"{prefix}.{key}": value for key, value in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, _Value]) -> dict[str, _Value]:
    """Those whose names begin with ``prefix.``, without it."""
    return {
        key.removeprefix(f"{prefix}."): value for key, value in tensors.items() if key.startswith(f"{prefix}.")
    }
