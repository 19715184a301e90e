"""Curvature that was measured once and no more, as where a loop has left training mode."""

import warnings
from collections.abc import Iterable, Mapping

from torch import nn

from ..curvature import Block
from .inversion import CALLS_FROM_STEP


class StaleCurvature:
    """Names each block once whose P was to be measured anew, and was not, though it has a gradient.

    A layer that had no part in the step has none: no gradient, or zeros where gradients are zeroed in place.
    """

    def __init__(self) -> None:
        self._named: set[Block] = set()
        self.is_meant = False
        """Whether P is to stay as it is, so that there is nothing to say."""

    def name(self, unmeasured: Iterable[Block], parameters: Mapping[str, nn.Parameter]) -> None:
        """Warn of those of the blocks with a gradient, all in one; to be called by ``step``."""
        asked = [] if self.is_meant else [block for block in unmeasured if block not in self._named]
        new = [block for block in asked if any(_has_gradient(parameters[key]) for key in block.parameters)]
        if new:
            self._named.update(new)
            warnings.warn(
                f"the curvature of layer {new[0].name!r} and {len(new) - 1} others was not measured anew in a "
                "step that was to (is the model in evaluation mode since, or optimizer.measure(loss) no longer "
                "called?): steps go on by what was measured before",
                stacklevel=CALLS_FROM_STEP,
            )


def _has_gradient(p: nn.Parameter) -> bool:
    return p.grad is not None and bool(p.grad.count_nonzero())
