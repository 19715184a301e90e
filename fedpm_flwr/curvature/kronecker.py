"""P = w·(G ⊗ A) + s·I, a Kronecker product of two factors: K-FAC."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .base import Curvature, CurvatureError, Operator
from .linalg import (
    MARGIN,
    add_to_diagonal,
    at_least_float32,
    block_diagonal,
    check_size,
    check_square,
    eigh,
    grouped,
    outer,
    promoted,
)

_ROUNDING = 1e-4
"""How negative a second moment's least eigenvalue may be, as a share of its largest: float32 stays well below."""
_MAX_EIGENVALUE = 1e50
"""Of one factor: beside a factor of 0 it would not show in P, but in means of factors."""


@dataclass(frozen=True, eq=False)
class Kronecker(Curvature):
    """P·Δ = w·GΔA + s·Δ with G symmetric [rows, rows] and A symmetric [columns, columns].

    With A = E[x xᵀ] of the layer's inputs and G the second moment of the loss's gradient by its
    outputs this is K-FAC (Martens and Grosse 2015). A stack of G [groups, rows / groups, …] and of A
    [groups, columns, columns] acts on groups of rows. Damping is exact, P + λI, by the factors'
    eigenvalues; so the server mixes by the very P that a client stepped with.

    A sum of two has no such form: it is a ``Sum``. ``mean_factors`` is the approximation to it.
    """

    kind = "kronecker"
    symmetric = frozenset({"left", "right"})
    left: Tensor
    right: Tensor
    weight: float = 1.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        check_square(self.left, "a left Kronecker factor")
        check_square(self.right, "a right Kronecker factor")
        if self.left.shape[:-2] != self.right.shape[:-2]:
            raise CurvatureError(
                f"Kronecker factors of different groups: {list(self.left.shape)} and {list(self.right.shape)}"
            )

    def matmul(self, delta: Tensor) -> Tensor:
        self._check(delta)
        delta, left, dtype = promoted(delta, self.left)
        product = left @ grouped(delta, left) @ self.right.to(left)
        return (self.weight * product.reshape(delta.shape) + self.shift * delta).to(dtype)

    def solve(self, rhs: Tensor) -> Tensor:
        self._check(rhs)
        return self.inverse().matmul(rhs)

    def inverse(self, clamped: bool = False) -> "KroneckerBasis":
        """P⁻¹ by the factors' eigenvalues: in float32 at least, and once more in float64 where that fails.

        ``clamped``: eigenvalues of G and A below 0, as rounding makes them, count as 0, and those of
        P as no less than rounding: for approximations, which never fail then.
        """
        own = at_least_float32(self.left).dtype
        for dtype in dict.fromkeys((own, torch.float64)):
            (left, left_basis), (right, right_basis) = eigh(self.left.to(dtype)), eigh(self.right.to(dtype))
            if clamped:
                left, right = left.clamp(min=0), right.clamp(min=0)
            values = self._eigenvalues(left, right)
            least = torch.finfo(dtype).eps * max(values.shape[-2:]) * values.abs().amax()
            values = values.clamp(min=least) if clamped else values
            if (clamped or values.amin() > least) and torch.isfinite(1 / values).all():
                return KroneckerBasis(left_basis, right_basis, 1 / values).to(own)
        raise CurvatureError(self._not_definite())

    def clamped(self) -> "Kronecker":
        """Likewise safe as a term of a ``Sum``: G and A with eigenvalues from 0, and s raised if P needs it."""
        (left, left_basis), (right, right_basis) = (eigh(m.double()) for m in (self.left, self.right))
        left, right = left.clamp(min=0), right.clamp(min=0)
        least = 2 * MARGIN * torch.finfo(left.dtype).eps * self._eigenvalues(left, right).sum(dim=(-2, -1)).amax()
        return Kronecker(
            outer(left_basis * left.sqrt()[..., None, :]),
            outer(right_basis * right.sqrt()[..., None, :]),
            self.weight,
            max(self.shift, float(least)),
        )

    def damped(self, damping: float) -> "Kronecker":
        return replace(self, shift=self.shift + damping)

    def scaled(self, factor: float) -> "Kronecker":
        return replace(self, weight=self.weight * factor, shift=self.shift * factor)

    def diagonal(self, rows: int, columns: int) -> Tensor:
        left, right = (m.diagonal(dim1=-2, dim2=-1) for m in (self.left, self.right))
        product = (left[..., :, None] * right[..., None, :]).reshape(rows, columns)
        return self.weight * product + self.shift

    def to_dense(self, size: int) -> Tensor:
        lefts, rights = (
            self.left.reshape(-1, *self.left.shape[-2:]),
            self.right.reshape(-1, *self.right.shape[-2:]),
        )
        if size != len(lefts) * lefts.shape[-1] * rights.shape[-1]:
            raise CurvatureError(f"{self._describe()} has no form of side {size}")
        blocks = [torch.kron(left, right) for left, right in zip(lefts, rights, strict=True)]
        return add_to_diagonal(self.weight * block_diagonal(blocks), self.shift)

    def check_positive_definite(self) -> None:
        """By the eigenvalues of both factors, which may be 0, if P is damped enough, but not negative."""
        values = []
        for factor in (self.left, self.right):
            own = torch.linalg.eigvalsh(factor)
            if not (own.amin(-1) >= -_ROUNDING * own.amax(-1)).all():
                raise CurvatureError(self._not_definite())
            values.append(own)
        product = self._eigenvalues(*values)
        trace = product.sum(dim=(-2, -1))
        check_size(trace)
        largest = max(float(own.amax()) for own in values)
        if not largest < _MAX_EIGENVALUE:
            raise CurvatureError(
                f"a Kronecker factor of eigenvalue {largest:.3g}; allowed: below {_MAX_EIGENVALUE:g}"
            )
        if not (product.amin(dim=(-2, -1)) > MARGIN * torch.finfo(product.dtype).eps * trace).all():
            raise CurvatureError(self._not_definite())

    @classmethod
    def fits(cls, shapes: Mapping[str, Sequence[int]], rows: int, columns: int) -> bool:
        left, right = list(shapes["left"]), list(shapes["right"])
        groups = left[0] if len(left) == 3 else 1
        head = left[:-2]
        return (
            len(head) < 2
            and rows % groups == 0
            and left == [*head, rows // groups, rows // groups]
            and right == [*head, columns, columns]
        )

    def _check(self, delta: Tensor) -> None:
        groups = len(self.left) if self.left.ndim == 3 else 1
        if delta.ndim != 2 or tuple(delta.shape) != (groups * self.left.shape[-1], self.right.shape[-1]):
            raise CurvatureError(f"{list(delta.shape)} met {self._describe()}")

    def balanced(self) -> tuple[Tensor, Tensor]:
        """G/c and c·A, such that both have the same mean on their diagonals, group by group."""
        left, right = (m.diagonal(dim1=-2, dim2=-1).mean(-1) for m in (self.left, self.right))
        ratio = left.sqrt() / right.sqrt()  # of which neither overflows where the other does
        ratio = torch.where((left > 0) & (right > 0) & ratio.isfinite(), ratio, 1.0)[..., None, None]
        return self.left / ratio, self.right * ratio

    def _eigenvalues(self, left: Tensor, right: Tensor) -> Tensor:
        """Of P, from those of its factors, [.., rows, columns]."""
        return self.weight * left[..., :, None] * right[..., None, :] + self.shift

    def _not_definite(self) -> str:
        sides = f"{self.left.shape[-1]} and {self.right.shape[-1]}"
        return f"a Kronecker product of sides {sides} is not positive definite"

    def _describe(self) -> str:
        return f"a Kronecker product of {list(self.left.shape)} and {list(self.right.shape)}"


@dataclass(frozen=True, eq=False)
class KroneckerBasis(Operator):
    """P⁻¹·Δ = Q (h ⊙ (QᵀΔV)) Vᵀ: diagonal in the basis of G's and A's eigenvectors Q and V."""

    kind = "kronecker-basis"
    left: Tensor
    right: Tensor
    values: Tensor

    def matmul(self, delta: Tensor) -> Tensor:
        delta, left, dtype = promoted(delta, self.left)
        right = self.right.to(left)
        turned = left.mT @ grouped(delta, left) @ right
        return (left @ (self.values.to(left) * turned) @ right.mT).reshape(delta.shape).to(dtype)


def mean_factors(first: Kronecker, second: Kronecker) -> Kronecker:
    """The factored approximation to P + Q: w·(Ḡ ⊗ Ā) with the weighted mean of either factor. Exact if P = Q.

    G ⊗ A is (cG) ⊗ (A/c) for every c. So that nobody's choice of c matters, both factors are brought
    to the same mean diagonal before they meet.
    """
    weight = first.weight + second.weight
    (g, a), (h, b) = first.balanced(), second.balanced()
    left = (first.weight * g + second.weight * h) / weight
    right = (first.weight * a + second.weight * b) / weight
    return Kronecker(left, right, weight, first.shift + second.shift)
