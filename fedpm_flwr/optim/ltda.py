"""LTDA (Sen et al., PReMI 2023): gradients divided by a diagonal from the Hessian's first row."""

from typing import Unpack

from torch import nn

from ..estimators import FirstRow
from .second_order import Params, SecondOrder
from .shared import SharedWithDecay


class LTDA(SecondOrder):
    """θ ← θ − η g / (|v²/v₀| + λ) with v the first row of the Hessian of the loss.

    Call ``measure(loss)`` before ``loss.backward()``. ``estimators.FirstRow`` says what of this the
    source gives, and what is inferred.

    The arguments are those of ``SecondOrder``.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Params | None = None,
        *,
        lr: float = 0.1,
        damping: float = 1.0,
        ema: float = 0.0,
        refresh_interval: int = 1,
        inverse_interval: int = 1,
        **shared: Unpack[SharedWithDecay],
    ) -> None:
        super().__init__(
            model,
            params,
            lambda owned: FirstRow(model, owned),
            lr=lr,
            damping=damping,
            ema=ema,
            refresh_interval=refresh_interval,
            inverse_interval=inverse_interval,
            **shared,
        )
