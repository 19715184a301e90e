"""FOOF (Benzing 2022): each layer's gradient times the inverse second moment of its inputs."""

from typing import Unpack

from torch import nn

from ..estimators import InputCovariance
from .second_order import Params, SecondOrder
from .shared import SharedWithDecay


class FOOF(SecondOrder):
    """W ← W − η g (A + λI)⁻¹ with A the running average of E[x xᵀ] over the layer's inputs x.

    W and its gradient g are [out, in(+1)], the bias as last column. λ has the unit of a squared
    activation. ``InputCovariance`` says which layers; all others take plain gradient steps.

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
