"""The interface of every preconditioner P."""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import ClassVar, Self, get_type_hints

import torch
from torch import Tensor


class CurvatureError(ValueError):
    """A curvature is not positive definite, not finite, or of the wrong size."""


@dataclasses.dataclass(frozen=True, eq=False)
class Operator(ABC):
    """A symmetric matrix that acts on a layer's change Δ, a matrix [rows, columns].

    Immutable: every operation returns a new object. A dataclass whose tensors are its ``parts``.
    """

    kind: ClassVar[str]
    """The name under which the wire format and an optimizer's state know this class."""

    @abstractmethod
    def matmul(self, delta: Tensor) -> Tensor:
        """P·Δ, [rows, columns] -> [rows, columns]."""

    @classmethod
    @cache
    def part_names(cls) -> tuple[str, ...]:
        """The names of P's tensors."""
        hints = get_type_hints(cls)  # not field.type, which is text in a file with annotations from __future__
        return tuple(field.name for field in dataclasses.fields(cls) if hints[field.name] is Tensor)

    def parts(self) -> dict[str, Tensor]:
        """P's tensors by name."""
        return {name: getattr(self, name) for name in self.part_names()}

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """P with the function applied to each of its tensors."""
        return self.with_parts({name: function(tensor) for name, tensor in self.parts().items()})

    def with_parts(self, parts: Mapping[str, Tensor]) -> Self:
        """P with these tensors, by name, in place of its own."""
        return dataclasses.replace(self, **parts)

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Self:
        """P with its tensors of this dtype, on this device."""
        return self.map(lambda tensor: tensor.to(dtype=dtype, device=device))


class Curvature(Operator):
    """A symmetric positive semidefinite P. Sums of kinds are made by ``fedpm_flwr.curvature.plus``."""

    symmetric: ClassVar[frozenset[str]] = frozenset()
    """The parts that are symmetric matrices [n, n], or stacks of them [groups, n, n]."""

    positive: ClassVar[frozenset[str]] = frozenset()
    """The parts that are vectors or diagonals of numbers >= 0, each of which counts by its relative precision."""

    @abstractmethod
    def solve(self, rhs: Tensor) -> Tensor:
        """P⁻¹·R, [rows, columns] -> [rows, columns].

        Raises:
            CurvatureError: P is not positive definite.
        """

    @abstractmethod
    def inverse(self) -> Operator:
        """P⁻¹, to be multiplied by again and again.

        Raises:
            CurvatureError: P is not positive definite.
        """

    @abstractmethod
    def damped(self, damping: float) -> "Curvature":
        """P + λI."""

    @abstractmethod
    def scaled(self, factor: float) -> "Curvature":
        """c·P."""

    def plus_closed(self, other: "Curvature") -> "Curvature | None":
        """P + Q where this kind knows a kind that holds the sum, else None; Q's own answer counts as well."""
        return None

    @abstractmethod
    def diagonal(self, rows: int, columns: int) -> Tensor:
        """The diagonal of P, [rows, columns] as Δ is; its mean is P's mean eigenvalue."""

    @abstractmethod
    def to_dense(self, size: int) -> Tensor:
        """P as a matrix [size, size] on vec(Δ), rows of Δ one after another; size = rows · columns."""

    @abstractmethod
    def check_positive_definite(self) -> None:
        """Whether P may be summed with others and the sum inverted.

        Raises:
            CurvatureError: P is indefinite, or singular as far as its dtype can tell.
        """

    @classmethod
    def side(cls, shapes: Mapping[str, Sequence[int]]) -> int:
        """The side of the square matrix that has as many numbers as the largest symmetric part of these shapes."""
        return max((math.isqrt(math.prod(shapes[part]) - 1) + 1 for part in cls.symmetric), default=0)

    @classmethod
    @abstractmethod
    def fits(cls, shapes: Mapping[str, Sequence[int]], rows: int, columns: int) -> bool:
        """Whether parts of these shapes make a P for a Δ of this shape."""
