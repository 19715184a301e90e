"""The setting ``codec``: what becomes of each layer's curvature before it travels.

| codec | a symmetric part, as FOOF's A [n, n] | bytes |
| --- | --- | --- |
| ``triangle-float64``, ``-float32`` | its triangle | 8 or 4 · n(n + 1)/2 |
| ``triangle-bfloat16``, ``-int8`` | its rounded Cholesky factor (``rounded_factor``) | 2 or 1 · n(n + 1)/2 + 4n |
| ``rank-8`` | 8 leading eigenvectors, and a number for the rest (``low_rank``) | 8(n + 4) + 4 |
| ``rank-0.9`` | so many that they hold 0.9 of the trace | – |
| ``positions`` | of convolutions: channels ⊗ kernel positions (``positions``); others as ``triangle-int8`` | – |
| ``diagonal`` | its diagonal | 2n |
| ``auto``, ``auto-0.1`` | what is best for 5 %, or 10 %, of the parameters' bytes (``budget``) | – |

Where eigenvectors would take more bytes than ``triangle-int8``, that is sent instead. Parts that are vectors or
diagonals are sent in full by the first two, else as bfloat16; eigenvectors as int8, by ``triangle-bfloat16`` as
bfloat16. ``auto`` may send of a diagonal its mean row, and of a layer nothing. A server reads any of
them, whatever it asked for: clients may differ.
"""

from collections.abc import Mapping, Sequence

import torch

from ..curvature import Curvature, Diagonal, KroneckerRight, LayerCurvature, LowRank
from ..curvature.linalg import leading
from .low_rank import BASIS, FLOOR, Spectral
from .packed import Packed, layout, pack, size

INT8 = "factor-int8"
_FULL = ("float64", "float32")
_FIRST_RANK = 16


def compress(layer: LayerCurvature, codec: str, parameters: Mapping[str, Sequence[int]] | None) -> Packed:
    """A layer's curvature by one of the codecs above, all but ``auto``.

    ``parameters`` has the shapes of the model's parameters, of which ``positions`` needs to know.

    Raises:
        ValueError: the matrix is not finite, or shapes are missing.
    """
    name, _, number = codec.partition("-")
    curvature = layer.curvature
    if name == "triangle":
        return pack(curvature, by_dtype(curvature, number))
    if name == "diagonal":
        return of_rank(curvature, 0)
    if name == "rank":
        return of_rank(curvature, int(number)) if number.isdigit() else _of_share(curvature, float(number))
    k = _kernel_positions(layer, parameters)
    codecs = by_dtype(curvature, "int8")
    return pack(curvature, codecs | dict.fromkeys(curvature.symmetric, f"positions-{k}") if k > 1 else codecs)


def is_exact(codec: str, dtype: torch.dtype) -> bool:
    """Whether P, measured for parameters of this dtype, arrives as it is."""
    return codec == "triangle-float64" or (codec == "triangle-float32" and dtype != torch.float64)


def by_dtype(curvature: Curvature, dtype: str) -> dict[str, str]:
    """A codec for each part: float64, float32, bfloat16 or int8."""
    matrices = f"triangle-{dtype}" if dtype in _FULL else f"factor-{dtype}"
    vectors = f"values-{dtype}" if dtype in _FULL else "values-bfloat16"

    def codec(part: str, tensor: torch.Tensor) -> str:
        if part in curvature.symmetric:
            return matrices
        in_columns = dtype == "int8" and tensor.ndim > 1 and part not in curvature.positive
        return "columns-int8" if in_columns else vectors

    return {part: codec(part, tensor) for part, tensor in curvature.parts().items()}


def of_rank(curvature: Curvature, ranks: int | Mapping[str, int]) -> Packed:
    """Each symmetric part by so many eigenvectors, or ``triangle-int8`` where that takes fewer bytes."""
    chosen = dict.fromkeys(curvature.symmetric, ranks) if isinstance(ranks, int) else ranks
    if isinstance(curvature, KroneckerRight) and curvature.factor.ndim == 2:
        return _one_factor(curvature, chosen["factor"])
    codecs = by_dtype(curvature, "int8")
    for part, rank in chosen.items():
        codecs[part] = _cheaper(rank, tuple(getattr(curvature, part).shape))
    return pack(curvature, codecs)


def _one_factor(curvature: KroneckerRight, rank: int) -> Packed:
    """As a curvature of a cheaper kind, which the server need not make a matrix of."""
    factor = curvature.factor
    shape = tuple(factor.shape)
    if rank == 0:
        return pack(Diagonal(factor.diagonal()[None]), {"values": "values-bfloat16"})
    if _cheaper(rank, shape) == INT8:
        return pack(curvature, {"factor": INT8})
    shapes = {FLOOR: shape[:1], BASIS: (shape[0], rank)}
    codecs = {FLOOR: "constant", BASIS: "columns-int8"}
    return Packed(LowRank.kind, shapes, codecs, Spectral(rank).pack(factor))


def _cheaper(rank: int, shape: tuple[int, ...]) -> str:
    if rank > shape[-1] or bytes_of_rank(rank, shape) >= bytes_of_int8(shape):
        return INT8
    return f"spectral-{rank}"


def bytes_of_rank(rank: int, shape: tuple[int, ...]) -> int:
    """Of a matrix of this shape by so many eigenvectors."""
    return size(Spectral(rank).layout(shape))


def bytes_of_int8(shape: tuple[int, ...]) -> int:
    """Of a matrix of this shape as ``triangle-int8``."""
    return size(layout(KroneckerRight, {"factor": shape}, {"factor": INT8}))


def _of_share(curvature: Curvature, share: float) -> Packed:
    """By the least rank whose eigenvalues hold this share of the trace, for each part."""
    return of_rank(curvature, {part: _rank(getattr(curvature, part), share) for part in curvature.symmetric})


def _rank(matrix: torch.Tensor, share: float) -> int:
    side = matrix.shape[-1]
    wanted = share * matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
    known = min(_FIRST_RANK, side)
    while True:
        held = leading(matrix, known)[0].clamp(min=0).cumsum(-1)
        enough = (held >= wanted[..., None]).all(tuple(range(held.ndim - 1)))
        if enough.any():
            return int(enough.nonzero()[0]) + 1
        if known == side or 2 * known > side:  # by then ``triangle-int8`` is cheaper
            return side
        known *= 2


def _kernel_positions(layer: LayerCurvature, parameters: Mapping[str, Sequence[int]] | None) -> int:
    """Kernel height times width of a convolution with one input factor; 1: there is none."""
    key = layer.block.parameters[0]
    if parameters is None or key not in parameters:
        raise ValueError(f"codec 'positions' needs to know the model's parameter {key!r}")
    weight = parameters[key]
    return int(torch.Size(weight[2:]).numel()) if isinstance(layer.curvature, KroneckerRight) else 1
