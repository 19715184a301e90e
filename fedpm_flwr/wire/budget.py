"""``codec="auto"``: a number of bytes, spent across layers where it buys most.

A layer's curvature is sent by its leading eigenvectors and a number for the rest, or in full if that is no dearer.
Mixing computes (Σ wᵢPᵢ)⁻¹ Σ wᵢPᵢΔᵢ with damped Pᵢ: a direction with eigenvalue μ ≫ λ that is left out is mixed by
the wrong trust, one with μ ≪ λ is averaged anyway. So what an eigenvector buys is the square of the relative
error that its absence would make, (μ / (μ + λ))², as a share of what all of its layer's do. Every layer counts
alike, and its first eigenvector as half of it at least; what buys most for its bytes is taken first. A layer for
which there is not even that sends nothing, and is averaged.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from ..curvature import Curvature, Diagonal, Kronecker, LayerCurvature
from ..curvature.linalg import leading
from .compression import by_dtype, bytes_of_int8, bytes_of_rank, of_rank
from .packed import Packed, layout, pack, size

_HEADER, _TENSOR = 270, 75
"""Bytes of a payload's header, at most: for each layer, beside its names, and for each of its tensors."""
_FIRST = 0.5
"""What a layer's first eigenvector buys at least of all that its curvature does; all of them share the rest."""
_MOST = 128
"""Eigenvectors that are looked at, of a matrix too large to have them all."""


@dataclass(frozen=True)
class Offer:
    """One form of a layer: its bytes, what it buys, and how to make it."""

    bytes: int
    gain: float
    make: Callable[[], Packed]


def spend(layers: Sequence[LayerCurvature], bytes_allowed: float) -> list[Packed | None]:
    """What to send of each layer in this many bytes, headers included; None: nothing.

    Raises:
        CurvatureError: a matrix is not finite.
    """
    offers = [_offers(layer, bytes_allowed) for layer in layers]
    chosen: list[Offer | None] = [None] * len(layers)
    left = bytes_allowed
    queue = [entry for index in range(len(layers)) if (entry := _next(index, 0, None, offers[index]))]
    heapq.heapify(queue)
    while queue:
        _, index, place = heapq.heappop(queue)
        offer, before = offers[index][place], chosen[index]
        dearer = offer.bytes - (before.bytes if before else 0)
        if dearer <= left:
            chosen[index], left = offer, left - dearer
            if entry := _next(index, place + 1, offer, offers[index]):
                heapq.heappush(queue, entry)
    return [offer.make() if offer else None for offer in chosen]


def _next(index: int, place: int, before: Offer | None, offers: Sequence[Offer]) -> tuple[float, int, int] | None:
    """A layer's next offer, those of most gain for their bytes first."""
    if place == len(offers):
        return None
    offer = offers[place]
    gain, dearer = offer.gain - (before.gain if before else 0.0), offer.bytes - (before.bytes if before else 0)
    return -gain / max(dearer, 1e-9), index, place


def _offers(layer: LayerCurvature, bytes_allowed: float) -> list[Offer]:
    """A layer's forms, each dearer than the one before and better."""
    curvature = layer.curvature
    names = (layer.block.name, *layer.block.parameters, *chain.from_iterable(layer.block.copies))
    fixed = _HEADER + _TENSOR * 3 * len(curvature.part_names()) + 2 * len("".join(names))
    if isinstance(curvature, Diagonal):
        return _diagonals(curvature, fixed)
    if not curvature.symmetric:
        return [_whole(curvature, by_dtype(curvature, "int8"), 1.0, fixed)]
    return _by_ranks(curvature, layer.damping, bytes_allowed, fixed)


def _by_ranks(curvature: Curvature, damping: float, bytes_allowed: float, fixed: int) -> list[Offer]:
    """An eigenvector of each part, then one more at a time, where it buys most, at last all in full."""
    shapes = {part: tuple(getattr(curvature, part).shape) for part in sorted(curvature.symmetric)}
    vectors = []
    for part, shape in shapes.items():
        gains = _gains(getattr(curvature, part), damping / _other_side(curvature, part), bytes_allowed)
        vectors += [(gain / shape[-1], gain / len(shapes), part) for gain in gains]
    ranks, gain, steps = dict.fromkeys(shapes, 0), _FIRST, list[tuple[dict[str, int], float]]()
    for _, more, part in sorted(vectors, key=lambda vector: -vector[0]):
        ranks, gain = ranks | {part: ranks[part] + 1}, gain + (1 - _FIRST) * more
        if all(ranks.values()):
            steps.append((ranks, gain))
    steps.append(({part: shape[-1] for part, shape in shapes.items()}, 1.0))
    return [
        Offer(fixed + _bytes(ranks, shapes), gain, partial(of_rank, curvature, ranks)) for ranks, gain in steps
    ]


def _bytes(ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(min(bytes_of_rank(ranks[part], shape), bytes_of_int8(shape)) for part, shape in shapes.items())


def _gains(matrix: Tensor, damping: float, bytes_allowed: float) -> list[float]:
    """(μ / (μ + λ))² of the leading eigenvalues, falling, as shares of what all together are likely to be."""
    side = matrix.shape[-1]
    known = int(min(side, max(bytes_allowed // side, 1), _MOST))
    values = leading(matrix, known)[0].reshape(-1, known).mean(0).clamp(min=0)
    left = matrix.diagonal(dim1=-2, dim2=-1).sum(-1).mean() - values.sum()
    rest = left.clamp(min=0) / max(side - known, 1)  # each of the others, if they are alike
    relative = (torch.cat([values, rest[None]]) / (torch.cat([values, rest[None]]) + damping)).nan_to_num() ** 2
    total = float(relative[:-1].sum() + (side - known) * relative[-1])
    return (relative[:-1] / (total or 1.0)).tolist()


def _other_side(curvature: Curvature, part: str) -> float:
    """By what the other factor multiplies this part's eigenvalues, on average; 1 without another."""
    if not isinstance(curvature, Kronecker):
        return 1.0
    other: Tensor = curvature.left if part == "right" else curvature.right
    return float(other.diagonal(dim1=-2, dim2=-1).mean()) or 1.0


def _diagonals(curvature: Diagonal, fixed: int) -> list[Offer]:
    """The mean row, if there are several, and then all."""
    whole = _whole(curvature, by_dtype(curvature, "int8"), 1.0, fixed)
    if 1 in curvature.values.shape:
        return [whole]
    mean = Diagonal(curvature.values.mean(0, keepdim=True))
    return [_whole(mean, by_dtype(mean, "int8"), 0.5, fixed), whole]


def _whole(curvature: Curvature, codecs: Mapping[str, str], gain: float, fixed: int) -> Offer:
    shapes = {part: tuple(tensor.shape) for part, tensor in curvature.parts().items()}
    cost = size(layout(type(curvature), shapes, codecs))
    return Offer(fixed + cost, gain, lambda: pack(curvature, codecs))
