"""The linear algebra that the kinds share. Matrices may be stacks of matrices, [groups, n, n]."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .base import CurvatureError

_MAX_TRACE = 1e100
MARGIN = 100.0
"""How many times ε tr(P) the least eigenvalue must be."""
_SMALL = 256
"""Up to this side all eigenvalues are as cheap as some."""
_OVERSAMPLES, _ITERATIONS = 8, 3


def cholesky(matrix: Tensor) -> Tensor:
    """The lower Cholesky factor of a symmetric matrix.

    Computed in float32 at least. A matrix that fails in float32 is tried once more in float64, and
    the factor is then float64.

    Raises:
        CurvatureError: the matrix is not positive definite.
    """
    matrix = at_least_float32(matrix)
    lower: Tensor
    lower, info = torch.linalg.cholesky_ex(matrix)
    if info.any() and matrix.dtype != torch.float64:
        lower, info = torch.linalg.cholesky_ex(matrix.double())
    if info.any() or not lower.sum(-1).isfinite().all():
        raise CurvatureError(f"a matrix of side {matrix.shape[-1]} is not positive definite")
    return lower


def cholesky_solve(matrix: Tensor, rhs: Tensor) -> Tensor:
    """M⁻¹·R for a symmetric positive definite M [n, n] and R [n, k], in R's dtype."""
    lower = cholesky(matrix)
    return torch.cholesky_solve(rhs.to(lower.dtype), lower).to(rhs.dtype)


def cholesky_inverse(matrix: Tensor) -> Tensor:
    """M⁻¹ for a symmetric positive definite M, in M's dtype, float32 at least."""
    return torch.cholesky_inverse(cholesky(matrix)).to(at_least_float32(matrix).dtype)


def check_positive_definite(matrix: Tensor) -> None:
    """Raise CurvatureError unless the least eigenvalue is above 100 ε tr(M), and tr(M) of a size to compute with.

    The margin adds up: a sum of matrices that have it has it too, so that one matrix on the edge
    cannot make the sum of all singular.
    """
    trace = check_trace(matrix)
    margin = MARGIN * torch.finfo(matrix.dtype).eps * trace
    lowered = matrix.clone()
    lowered.diagonal(dim1=-2, dim2=-1).sub_(margin[..., None])
    cholesky(lowered)


def check_trace(matrix: Tensor) -> Tensor:
    """tr(M) of each matrix, [] or [groups].

    Raises:
        CurvatureError: one is not of a size to compute with.
    """
    trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
    check_size(trace)
    return trace


def check_size(trace: Tensor) -> None:
    """Raise CurvatureError unless these traces are of a size to compute with."""
    for value in trace.flatten().tolist():
        if not 1 / _MAX_TRACE < value < _MAX_TRACE:
            raise CurvatureError(f"a matrix of trace {value:.3g}; allowed: {1 / _MAX_TRACE:g} to {_MAX_TRACE:g}")


def check_square(matrix: Tensor, name: str, stacks: bool = True) -> None:
    """Raise CurvatureError unless the matrix is [n, n] (or a stack of such) and floating point."""
    if (
        matrix.ndim not in ((2, 3) if stacks else (2,))
        or matrix.shape[-1] != matrix.shape[-2]
        or not matrix.is_floating_point()
    ):
        raise CurvatureError(
            f"{name} must be a square floating-point matrix, not {matrix.dtype} {list(matrix.shape)}"
        )


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [.., n] and eigenvectors [.., n, n], in M's dtype, float32 at least; float64 if that fails.

    Raises:
        CurvatureError: there are none, as where the matrix is not finite.
    """
    matrix = at_least_float32(matrix)
    for dtype in (matrix.dtype, torch.float64):
        try:
            values, vectors = torch.linalg.eigh(matrix.to(dtype))
        except RuntimeError:
            continue
        if torch.isfinite(values).all():
            return values.to(matrix.dtype), vectors.to(matrix.dtype)
    raise CurvatureError(f"a matrix of side {matrix.shape[-1]} has no eigenvalues: is it finite?")


def leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The ``rank`` largest eigenvalues [.., rank], falling, and their eigenvectors [.., n, rank].

    Of a large positive semidefinite matrix by subspace iteration from a fixed start (Halko, Martinsson and
    Tropp 2011): O(n² rank), and eigenvalues that lie close together may share their vectors otherwise.

    Raises:
        CurvatureError: there are none, as where the matrix is not finite.
    """
    side, width = matrix.shape[-1], rank + _OVERSAMPLES
    if side <= _SMALL or 3 * width > side:
        values, vectors = eigh(matrix)
        return values[..., -rank:].flip(-1), vectors[..., -rank:].flip(-1)
    matrix = at_least_float32(matrix)
    if not matrix.sum(-1).isfinite().all():
        raise CurvatureError(f"a matrix of side {side} has no eigenvalues: it is not finite")
    start = torch.randn(side, width, generator=torch.Generator().manual_seed(0)).to(matrix)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(matrix @ basis).Q
    values, turned = eigh(basis.mT @ matrix @ basis)
    return values[..., -rank:].flip(-1), (basis @ turned[..., -rank:]).flip(-1)


def outer(factor: Tensor) -> Tensor:
    """U Uᵀ, symmetric to the bit, which a matrix product is not: solvers read one triangle alone."""
    product = factor @ factor.mT
    return product.tril() + product.tril(-1).mT


def add_to_diagonal(matrix: Tensor, number: float) -> Tensor:
    """M + cI."""
    matrix = matrix.clone()
    matrix.diagonal(dim1=-2, dim2=-1).add_(number)
    return matrix


def grouped(delta: Tensor, factor: Tensor) -> Tensor:
    """Δ [rows, columns] as [groups, rows / groups, columns] if the factor is a stack, else as it is."""
    return delta if factor.ndim == 2 else delta.reshape(len(factor), -1, delta.shape[-1])


def stack(factor: Tensor) -> Tensor:
    """[groups, n, n], with one group if it is a single matrix."""
    return factor if factor.ndim == 3 else factor[None]


def block_diagonal(blocks: Iterable[Tensor]) -> Tensor:
    """The matrix of these square blocks along its diagonal."""
    matrix: Tensor = torch.block_diag(*blocks)
    return matrix


def promoted(delta: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    """Δ and a part of P in the wider of their dtypes, on Δ's device; and the dtype that Δ came in."""
    dtype = torch.promote_types(delta.dtype, factor.dtype)
    return delta.to(dtype), factor.to(delta.device, dtype), delta.dtype


def at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def conjugate_gradients(
    matmul: Callable[[Tensor], Tensor],
    rhs: Tensor,
    precondition: Callable[[Tensor], Tensor],
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, float]:
    """Solve P·X = R by preconditioned conjugate gradients (Hestenes and Stiefel 1952).

    Returns X and what √(ρᵀM⁻¹ρ / RᵀM⁻¹R) is then, with ρ = R − P·X and M the preconditioner. The
    error in the norm of P falls with every iteration, so X is of use even where the tolerance is
    not reached.

    Raises:
        CurvatureError: P or M turns out not to be positive definite.
    """
    x = torch.zeros_like(rhs)
    if not rhs.any():
        return x, 0.0
    residual = rhs
    direction = z = precondition(residual)
    start = rho = _positive(residual, z)
    while rho > tolerance**2 * start and max_iterations:
        max_iterations -= 1
        product = matmul(direction)
        step = rho / _positive(direction, product)
        x = x + step * direction
        residual = residual - step * product
        if not residual.any():
            break
        z = precondition(residual)
        rho, old = _positive(residual, z), rho
        direction = z + (rho / old) * direction
    residual = rhs - matmul(x)  # anew, since rounding lets the recursion drift
    return x, (float((residual * precondition(residual)).sum().clamp(min=0)) / start) ** 0.5


def _positive(a: Tensor, b: Tensor) -> float:
    """aᵀb > 0, as it is for b = Pa with P positive definite."""
    found = float((a * b).sum())
    if not 0 < found < math.inf:
        raise CurvatureError(f"a sum of curvatures is not positive definite: {found:.3g} in one direction")
    return found
