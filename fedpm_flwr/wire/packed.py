"""One layer's curvature as it travels."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..curvature import KINDS, Curvature, CurvatureError, LayerCurvature
from .codecs import codec_of_part
from .layout import Layout, prefixed, without_prefix


@dataclass(frozen=True, eq=False)
class Packed:
    """The kind of a curvature, the shape and codec of each of its parts, and the tensors that stand for them."""

    kind: str
    shapes: Mapping[str, tuple[int, ...]]
    codecs: Mapping[str, str]
    tensors: Mapping[str, Tensor]

    def curvature(self) -> Curvature:
        """As it arrives: float64 if it travels so, else float32; on the CPU."""
        kind = KINDS[self.kind]
        return kind(
            **{
                part: codec_of_part(self.codecs[part], part in kind.symmetric).unpack(
                    without_prefix(part, self.tensors), shape
                )
                for part, shape in self.shapes.items()
            }
        )


def entry_of(layer: LayerCurvature, packed: Packed) -> dict[str, Any]:
    """What a payload's table says of a layer that travels so."""
    return {
        "name": layer.block.name,
        "parameters": list(layer.block.parameters),
        "copies": dict(layer.block.copies),
        "kind": packed.kind,
        "codecs": dict(packed.codecs),
        "shapes": {part: list(shape) for part, shape in packed.shapes.items()},
        "damping": float(layer.damping),
    }


@contextmanager
def named(layer: LayerCurvature) -> Iterator[None]:
    """Errors of what is done here name the layer."""
    try:
        yield
    except ValueError as error:
        raise CurvatureError(f"layer {layer.block.name!r}: {error}") from error


def pack(curvature: Curvature, codecs: Mapping[str, str]) -> Packed:
    """The curvature with each part by its codec."""
    tensors: dict[str, Tensor] = {}
    parts = curvature.parts()
    for part, tensor in parts.items():
        codec = codec_of_part(codecs[part], part in curvature.symmetric)
        tensors |= prefixed(part, codec.pack(tensor.detach()))
    return Packed(curvature.kind, {part: tuple(tensor.shape) for part, tensor in parts.items()}, codecs, tensors)


def layout(kind: type[Curvature], shapes: Mapping[str, tuple[int, ...]], codecs: Mapping[str, str]) -> Layout:
    """The dtype and shape of each tensor that stands for a curvature of this kind, shapes and codecs.

    Raises:
        ValueError: there is no such codec, or it has no form for a part of this shape.
    """
    found: Layout = {}
    for part, shape in shapes.items():
        found |= prefixed(part, codec_of_part(codecs[part], part in kind.symmetric).layout(tuple(shape)))
    return found


def size(found: Layout) -> int:
    """Bytes of tensors of this layout."""
    return sum(dtype.itemsize * int(torch.Size(shape).numel()) for dtype, shape in found.values())
