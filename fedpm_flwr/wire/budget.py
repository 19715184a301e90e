"""``codec="auto"``: a number of bytes, spent across layers where it buys most.

A layer's curvature is sent by its leading eigenvectors and a number for the rest, or in full if that is no dearer.
Mixing computes (Σ wᵢPᵢ)⁻¹ Σ wᵢPᵢΔᵢ with damped Pᵢ: a direction with eigenvalue μ ≫ λ that is left out is mixed by
the wrong trust, one with μ ≪ λ is averaged anyway. So what an eigenvector buys is the square of the relative
error that its absence would make, (μ / (μ + λ))², as a share of what all of its layer's do. Every layer counts
alike, and its first eigenvector as half of it at least; what buys most for its bytes is taken first. A layer for
which there is not even that sends nothing, and is averaged.
"""

import heapq
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..curvature import KINDS, Curvature, Diagonal, Kronecker, KroneckerRight, LayerCurvature, LowRank
from ..curvature.linalg import leading
from .compression import INT8, by_dtype, bytes_of_int8, bytes_of_rank, of_rank
from .low_rank import BASIS, FLOOR
from .packed import Packed, entry_of, layout, named, pack, size

_INDEX = 9999
"""A layer's place in a payload, as long as it can be written."""
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
    """What to send of each layer in this many bytes, its share of the header included; None: nothing.

    Raises:
        CurvatureError: a matrix is not finite; names the layer.
    """
    offers: list[list[Offer]] = []
    for layer in layers:
        with named(layer):
            offers.append(_offers(layer, bytes_allowed))
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
    made: list[Packed | None] = []
    for layer, choice in zip(layers, chosen, strict=True):
        with named(layer):
            made.append(choice.make() if choice else None)
    return made


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
    if isinstance(curvature, Diagonal) and 1 not in curvature.values.shape:
        mean = Diagonal(curvature.values.mean(0, keepdim=True))
        return [_whole(layer, mean, 0.5, bytes_allowed), _whole(layer, curvature, 1.0, bytes_allowed)]
    if not curvature.symmetric:
        return [_whole(layer, curvature, 1.0, bytes_allowed)]
    return _by_ranks(layer, bytes_allowed)


def _by_ranks(layer: LayerCurvature, bytes_allowed: float) -> list[Offer]:
    """An eigenvector of each part, then one more at a time, where it buys most, at last all in full."""
    curvature = layer.curvature
    shapes = {part: tuple(getattr(curvature, part).shape) for part in sorted(curvature.symmetric)}
    gain, vectors = _FIRST, list[tuple[float, float, str]]()
    for part, shape in shapes.items():
        damping = layer.damping / _other_side(curvature, part)
        first, *more = _gains(getattr(curvature, part), damping, bytes_allowed)
        gain += (1 - _FIRST) * first / len(shapes)
        vectors += [(each / shape[-1], each / len(shapes), part) for each in more]
    ranks = dict.fromkeys(shapes, 1)
    steps = [(ranks, gain)]
    for _, each, part in sorted(vectors, key=lambda vector: -vector[0]):
        ranks, gain = ranks | {part: ranks[part] + 1}, gain + (1 - _FIRST) * each
        steps.append((ranks, gain))
    steps.append(({part: shape[-1] for part, shape in shapes.items()}, 1.0))
    fixed = max(_header(layer, form, bytes_allowed) for form in _forms(curvature, shapes))
    return [
        Offer(fixed + _bytes(ranks, shapes), gain, partial(of_rank, curvature, ranks)) for ranks, gain in steps
    ]


def _forms(curvature: Curvature, shapes: Mapping[str, tuple[int, ...]]) -> list[Packed]:
    """What a curvature may become, its numbers as long as they can be written."""
    all_shapes = {part: tuple(tensor.shape) for part, tensor in curvature.parts().items()}
    codecs = by_dtype(curvature, "int8")
    few = {part: f"spectral-{min(shape[-1], _MOST)}" for part, shape in shapes.items()}
    forms = [Packed(curvature.kind, all_shapes, codecs | each, {}) for each in (few, dict.fromkeys(shapes, INT8))]
    if isinstance(curvature, KroneckerRight) and curvature.factor.ndim == 2:
        side = curvature.factor.shape[-1]
        low_rank = {FLOOR: (side,), BASIS: (side, side)}
        forms.append(Packed(LowRank.kind, low_rank, {FLOOR: "constant", BASIS: "columns-int8"}, {}))
    return forms


def _header(layer: LayerCurvature, form: Packed, bytes_allowed: float) -> int:
    """Bytes of a payload's header that the layer takes in this form, at most."""
    end = int(max(bytes_allowed, 0))
    said = len(json.dumps(json.dumps(entry_of(layer, form), separators=(",", ":"))))
    for name, (_, shape) in layout(KINDS[form.kind], form.shapes, form.codecs).items():
        tensor = {f"{_INDEX}.{name}": {"dtype": "BF16", "shape": shape, "data_offsets": [end, end]}}
        said += len(json.dumps(tensor, separators=(",", ":")))
    return said


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


def _whole(layer: LayerCurvature, curvature: Curvature, gain: float, bytes_allowed: float) -> Offer:
    """All of a layer's curvature, as ``curvature``."""
    shapes = {part: tuple(tensor.shape) for part, tensor in curvature.parts().items()}
    codecs = by_dtype(curvature, "int8")
    cost = size(layout(type(curvature), shapes, codecs))
    fixed = _header(layer, Packed(curvature.kind, shapes, codecs, {}), bytes_allowed)
    return Offer(fixed + cost, gain, lambda: pack(curvature, codecs))
