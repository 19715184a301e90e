"""Newton's method for small models, by the exact Hessian or Gauss-Newton matrix."""

from typing import Unpack

from torch import nn

from ..estimators import ExactHessian
from .second_order import Params, SecondOrder
from .shared import SharedWithDecay


class Newton(SecondOrder):
    """θ ← θ − η (H + λI)⁻¹ g with H = ∂²loss/∂θ² over all trainable parameters together.

    Call ``measure(loss, outputs)`` before ``loss.backward()``. Where H is indefinite its eigenvalues
    are replaced by their absolute values (``estimators.positive``). Coupled weight decay ω adds ωI to H.
    With η = 1, λ = 0, a single local step on all of the client's data, FedPM takes the Newton step of
    the global loss.

    ``model``, ``params`` and all that is not listed here are as for ``SecondOrder``.

    Args:
        matrix: ``hessian``, or ``ggn``: the Gauss-Newton matrix, never indefinite for a convex loss.
        max_factor_side: the largest number of parameters.
    """

    is_newton = True
    _decay_is_curvature = True
    _fills_gradients = True  # a parameter that the loss does not depend on is no reason not to step the others

    def __init__(
        self,
        model: nn.Module,
        params: Params | None = None,
        *,
        matrix: str = "hessian",
        lr: float = 1.0,
        damping: float = 0.0,
        ema: float = 0.0,
        refresh_interval: int = 1,
        inverse_interval: int = 1,
        max_factor_side: int = 8192,
        **shared: Unpack[SharedWithDecay],
    ) -> None:
        super().__init__(
            model,
            params,
            lambda owned: ExactHessian(model, matrix, owned, max_factor_side),
            lr=lr,
            damping=damping,
            ema=ema,
            refresh_interval=refresh_interval,
            inverse_interval=inverse_interval,
            **shared,
        )
