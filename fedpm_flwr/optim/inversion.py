"""The inverse of a damped P, with λ raised until there is one."""

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from ..curvature import Curvature, CurvatureError, Operator

_RAISE_DAMPING_BY = 10.0
_MAX_RAISES = 12
CALLS_FROM_STEP = 5
"""From a method called by ``step``, through torch's two wrappers of it, to the caller of ``step``."""


def are_finite(parts: Mapping[str, Tensor]) -> Tensor:
    """Whether all entries are, by the sums of rows: much faster than one by one; too large a sum is not finite."""
    return torch.stack([part.sum(-1).isfinite().all() for part in parts.values()]).all()


def invert(curvature: Curvature, damping: float, layer: str) -> tuple[Operator, float]:
    """(P + λI)⁻¹ and λ, raised until there is one."""
    if not are_finite(curvature.parts()):
        raise CurvatureError(f"layer {layer!r}: its curvature is not finite; has training diverged?")
    for raised in range(_MAX_RAISES + 1):
        used = damping * _RAISE_DAMPING_BY**raised
        try:
            inverse = curvature.damped(used).inverse()
        except CurvatureError as error:
            if damping == 0:
                raise CurvatureError(f"layer {layer!r}: {error}, and its damping is 0") from error
            continue
        if raised:
            warnings.warn(
                f"layer {layer!r}: damping raised from {damping} to {used}", stacklevel=CALLS_FROM_STEP + 2
            )
        return inverse, used
    raise CurvatureError(f"layer {layer!r}: not positive definite even with damping {used}")
