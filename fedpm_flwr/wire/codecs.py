"""How a part of a curvature becomes named tensors. A new codec is listed in ``CODECS``."""

from typing import Protocol

import torch
from torch import Tensor

from ..curvature import Curvature
from .triangle import Triangle

VALUES = "values"


class Codec(Protocol):
    """A symmetric matrix [n, n], or a stack of them [groups, n, n], to named tensors and back."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the parts that are not symmetric matrices, which travel as they are."""

    def layout(self, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The dtype and shape of each tensor that stands for a matrix of this shape."""

    def pack(self, matrix: Tensor) -> dict[str, Tensor]:
        """The tensors that stand for the matrix, on the CPU."""

    def unpack(self, tensors: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """The matrix again, from tensors of this ``layout``."""


CODECS: dict[str, Codec] = {
    "triangle-float32": Triangle(torch.float32),
    "triangle-float64": Triangle(torch.float64),
}


def get_codec(name: str) -> Codec:
    """The codec of this name.

    Raises:
        ValueError: naming it and those there are.
    """
    if name not in CODECS:
        raise ValueError(f"unknown codec {name!r}; allowed: {', '.join(CODECS)}")
    return CODECS[name]


def layout(
    codec: Codec, kind: type[Curvature], shapes: dict[str, tuple[int, ...]]
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The dtype and shape of each tensor that stands for a curvature with parts of these shapes."""
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for part, shape in shapes.items():
        own = codec.layout(shape) if part in kind.symmetric else {VALUES: (codec.dtype, shape)}
        found |= {f"{part}.{key}": value for key, value in own.items()}
    return found


def pack(codec: Codec, curvature: Curvature) -> dict[str, Tensor]:
    """The tensors that stand for a curvature's parts, on the CPU."""
    packed: dict[str, Tensor] = {}
    for part, tensor in curvature.parts().items():
        symmetric = part in curvature.symmetric
        own = codec.pack(tensor) if symmetric else {VALUES: tensor.to("cpu", codec.dtype).contiguous()}
        packed |= {f"{part}.{key}": value for key, value in own.items()}
    return packed


def unpack(
    codec: Codec, kind: type[Curvature], shapes: dict[str, tuple[int, ...]], tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """A curvature's parts again, from tensors of this ``layout``."""
    parts = {}
    for part, shape in shapes.items():
        own = {key.removeprefix(f"{part}."): value for key, value in tensors.items() if key.startswith(f"{part}.")}
        parts[part] = codec.unpack(own, shape) if part in kind.symmetric else own[VALUES]
    return parts


def as_decoded(codec: Codec, curvature: Curvature) -> Curvature:
    """The curvature as it arrives when sent by this codec, in its own dtype and on its own device."""
    parts = curvature.parts()
    shapes = {part: tuple(tensor.shape) for part, tensor in parts.items()}
    arrived = unpack(codec, type(curvature), shapes, pack(codec, curvature))
    return curvature.with_parts({part: tensor.to(parts[part]) for part, tensor in arrived.items()})
