"""K-FAC (Martens and Grosse 2015): each layer's gradient between the inverses of two factors."""

from typing import Unpack

from torch import nn

from ..estimators import KroneckerFactors
from .second_order import Params, SecondOrder
from .shared import SharedWithDecay


class KFAC(SecondOrder):
    """W ← W − η (G ⊗ A + λI)⁻¹ g with A = E[x xᵀ] of a layer's inputs and G of the gradients by its outputs.

    The damping is exact, by the eigenvalues of A and G. λ has the unit of the loss per squared
    parameter. ``KroneckerFactors`` says which layers, and what ``fisher`` means; all others take
    plain gradient steps.

    ``model``, ``params`` and all that is not listed here are as for ``SecondOrder``.

    Args:
        fisher: ``sampled``, ``exact`` or ``empirical``: the last takes gradients as ``backward`` makes them, which
            must be of the mean loss, neither scaled nor one of several that add up.
        loss: ``cross-entropy`` or ``mse``: what is trained, as the mean over the batch.
        max_factor_side: layers with more inputs or outputs are stepped along their plain gradient.
        position_stride: s: A is measured at every s-th position only, of an image in each direction.
        seed: of the drawn targets.
        class_dim: where the model's outputs have more than two dimensions, the one that holds the classes: 1,
            the second, as torch's ``cross_entropy`` takes them, or -1, the last, as language models have them.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Params | None = None,
        *,
        fisher: str = "sampled",
        loss: str = "cross-entropy",
        lr: float = 0.1,
        damping: float = 0.1,
        ema: float = 0.95,
        refresh_interval: int = 5,
        inverse_interval: int = 10,
        max_factor_side: int = 8192,
        position_stride: int = 1,
        seed: int = 0,
        class_dim: int | None = None,
        **shared: Unpack[SharedWithDecay],
    ) -> None:
        if position_stride < 1:
            raise ValueError(f"position_stride must be >= 1, not {position_stride}")
        super().__init__(
            model,
            params,
            lambda owned: KroneckerFactors(
                model,
                fisher,
                loss,
                max_side=max_factor_side,
                parameters=owned,
                position_stride=position_stride,
                seed=seed,
                class_dim=class_dim,
                stacklevel=5,
            ),
            lr=lr,
            damping=damping,
            ema=ema,
            refresh_interval=refresh_interval,
            inverse_interval=inverse_interval,
            **shared,
        )
