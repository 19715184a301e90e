"""FOOF (Benzing 2022): each layer's gradient times the inverse second moment of its inputs."""

import warnings
from typing import Any, Unpack

import torch
from torch import nn

from ..curvature import Block
from ..estimators import InputCovariance
from .inversion import CALLS_FROM_STEP
from .second_order import Params, SecondOrder
from .shared import SharedWithDecay


class FOOF(SecondOrder):
    """W ← W − η g (A + λI)⁻¹ with A the running average of E[x xᵀ] over the layer's inputs x.

    W and its gradient g are [out, in(+1)], the bias as last column. λ has the unit of a squared
    activation. ``InputCovariance`` says which layers; all others take plain gradient steps.

    An Embedding's A is exact where its weight is only looked up. A row that was not, and has a gradient all
    the same, in the first step of the layer, shows another use of it, as by ``F.linear``: that layer is named
    in a warning, and takes plain gradient steps.

    ``model``, ``params`` and all that is not listed here are as for ``SecondOrder``.

    Args:
        max_factor_side: layers with more inputs are stepped along their plain gradient.
        position_stride: s: A is measured at every s-th position only, of an image in each direction.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Params | None = None,
        *,
        lr: float = 0.1,
        damping: float = 1.0,
        ema: float = 0.95,
        refresh_interval: int = 5,
        inverse_interval: int = 10,
        max_factor_side: int = 8192,
        position_stride: int = 1,
        **shared: Unpack[SharedWithDecay],
    ) -> None:
        if position_stride < 1:
            raise ValueError(f"position_stride must be >= 1, not {position_stride}")
        super().__init__(
            model,
            params,
            lambda owned: InputCovariance(model, max_factor_side, owned, position_stride, stacklevel=5),
            lr=lr,
            damping=damping,
            ema=ema,
            refresh_interval=refresh_interval,
            inverse_interval=inverse_interval,
            **shared,
        )
        self._checked: set[Block] = set()
        # Before what others add to gradients (``correct_gradients``), whose hooks come later.
        self.register_step_pre_hook(_check_before_step)

    def _check_gradients(self, stacklevel: int) -> None:
        """Leave out embeddings whose weight is not only looked up; once for each, since a device is waited for."""
        estimator = self._estimator
        assert isinstance(estimator, InputCovariance)
        for block, counts in estimator.lookups().items():
            gradient = self._parameters[block.parameters[0]].grad
            if gradient is None or block in self._checked:
                continue
            self._checked.add(block)
            if bool(((counts == 0) & (gradient != 0).any(dim=1)).any()):
                estimator.leave_out(block)
                warnings.warn(
                    f"layer {block.name!r}: rows that were not looked up have gradients (is its weight used "
                    "elsewhere too, as by F.linear, or in a term of the loss?): no curvature, averaged "
                    "instead of mixed",
                    stacklevel=stacklevel,
                )


def _check_before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    assert isinstance(optimizer, FOOF)
    optimizer._check_gradients(CALLS_FROM_STEP - 1)
