"""Sophia (Liu et al. 2023): momentum divided by a diagonal of the Hessian, each entry clipped."""

from typing import Any

import torch
from torch import Tensor, nn

from ..curvature import Block, Curvature, Diagonal, LayerCurvature, plus
from ..estimators import Estimator, GaussNewtonBartlett, Hutchinson
from .second_order import Params, SecondOrder
from .state import from_state, to_state

ESTIMATORS = ("gnb", "hutchinson")


class Sophia(SecondOrder):
    """θ ← θ − ηωθ − η·clip(m / max(γh, ε), 1), Algorithm 3 of arXiv 2305.14342.

    m ← β₁m + (1 − β₁)g in every step; h ← β₂h + (1 − β₂)ĥ whenever ĥ is measured; m and h start at 0.
    The P that it tells is max(γh, ε), with λ = 0.

    Args:
        model, params, shared: as for ``SecondOrder``; ``clip`` and ``momentum`` come on top of Sophia's own.
        betas: β₁, β₂.
        gamma: γ > 0: the smaller, the fewer entries are clipped.
        eps: ε > 0, the least γh.
        estimator: ``gnb``, of targets that the model draws, or ``hutchinson``, for which
            ``measure(loss)`` is to be called before ``loss.backward()``.
        loss: ``cross-entropy`` or ``mse``, for ``gnb``.
        refresh_interval: steps between two measurements of ĥ.
        weight_decay: ω, decoupled.
        seed: of the drawn targets, or of Hutchinson's signs.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Params | None = None,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.965, 0.99),
        gamma: float = 0.01,
        eps: float = 1e-12,
        estimator: str = "gnb",
        loss: str = "cross-entropy",
        refresh_interval: int = 10,
        weight_decay: float = 0.0,
        seed: int = 0,
        **shared: Any,
    ) -> None:
        if not (gamma > 0 and eps > 0 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError(f"gamma {gamma} and eps {eps} must be > 0, betas {betas} from 0 to below 1")
        if estimator not in ESTIMATORS:
            raise ValueError(f"unknown estimator {estimator!r}; allowed: {', '.join(ESTIMATORS)}")
        self._betas, self._gamma, self._eps = betas, gamma, eps

        def make(owned: list[nn.Parameter]) -> Estimator:
            if estimator == "gnb":
                return GaussNewtonBartlett(model, loss, owned, seed)
            return Hutchinson(model, parameters=owned, seed=seed)

        super().__init__(
            model,
            params,
            make,
            lr=lr,
            damping=0.0,
            ema=0.0,
            refresh_interval=refresh_interval,
            inverse_interval=1,
            weight_decay=weight_decay,
            decoupled_weight_decay=True,
            **shared,
        )

    def preconditioners(self) -> list[LayerCurvature]:
        """max(γh, ε) of every parameter that was stepped by it, and λ = 0."""
        return [
            LayerCurvature(layer.block, self._floored(layer.curvature), 0.0) for layer in super().preconditioners()
        ]

    def _update(self, state: dict[str, Any], measured: Curvature) -> None:
        beta = self._betas[1]
        old = from_state(state["curvature"]) if "curvature" in state else measured.scaled(0.0)
        assert isinstance(old, Curvature)
        new = plus(old.scaled(beta), measured.scaled(1 - beta))
        new = new.map(lambda part: torch.where(part.isfinite(), part, old.parts()["values"]))
        state["curvature"] = to_state(new)
        state.pop("inverse", None)

    def _prepare(self, block: Block, state: dict[str, Any], group: dict[str, Any]) -> None:
        if "inverse" in state:
            return
        curvature = from_state(state["curvature"])
        assert isinstance(curvature, Curvature)
        state["inverse"], state["damping"] = to_state(self._floored(curvature).map(torch.reciprocal)), 0.0

    def _precondition(self, state: dict[str, Any], gradient: Tensor, group: dict[str, Any]) -> Tensor:
        beta = self._betas[0]
        before = state.get("mean", torch.zeros_like(gradient))
        state["mean"] = beta * before + (1 - beta) * gradient
        return from_state(state["inverse"]).matmul(state["mean"]).clamp(-1.0, 1.0)

    def _floored(self, curvature: Curvature) -> Diagonal:
        values = curvature.parts()["values"]
        return Diagonal((self._gamma * values).clamp(min=self._eps))
