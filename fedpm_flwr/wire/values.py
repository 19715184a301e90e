"""A part that is no symmetric matrix, number by number."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import Layout

VALUES = "values"
SCALE = "scale"
VALUE = "value"
LARGEST = 127
"""Of the whole numbers of 8 bits, used alike on both sides of 0."""


@dataclass(frozen=True)
class Values:
    """The numbers as they are, in ``dtype``."""

    dtype: torch.dtype

    def layout(self, shape: tuple[int, ...]) -> Layout:
        return {VALUES: (self.dtype, shape)}

    def pack(self, part: Tensor) -> dict[str, Tensor]:
        return {VALUES: part.to("cpu", self.dtype).contiguous()}

    def unpack(self, tensors: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        values = tensors[VALUES]
        return values if values.dtype == torch.float64 else values.float()


class Int8Columns:
    """Whole numbers from −127 to 127, and for each column, of each matrix of a stack, by what to multiply them."""

    def layout(self, shape: tuple[int, ...]) -> Layout:
        if len(shape) < 2:
            raise ValueError(f"a part of shape {list(shape)} has no columns")
        return {VALUES: (torch.int8, shape), SCALE: (torch.float32, (*shape[:-2], shape[-1]))}

    def pack(self, part: Tensor) -> dict[str, Tensor]:
        part = part.to("cpu", torch.float32)
        scale = part.abs().amax(-2) / LARGEST
        whole = (part / scale.where(scale > 0, 1.0)[..., None, :]).round().clamp(-LARGEST, LARGEST)
        return {VALUES: whole.to(torch.int8).contiguous(), SCALE: scale}

    def unpack(self, tensors: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        return tensors[VALUES].float() * tensors[SCALE][..., None, :]


class Constant:
    """A vector, or each row of several, of equal numbers, by one of them."""

    def layout(self, shape: tuple[int, ...]) -> Layout:
        return {VALUE: (torch.float32, shape[:-1])}

    def pack(self, part: Tensor) -> dict[str, Tensor]:
        return {VALUE: part[..., 0].to("cpu", torch.float32).clone()}

    def unpack(self, tensors: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        return tensors[VALUE][..., None].expand(shape).clone()
