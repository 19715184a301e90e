"""Sophia (Liu et al. 2023): momentum divided by a diagonal of the Hessian, each entry clipped."""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ..curvature import Block, Curvature, Diagonal, LayerCurvature
from ..estimators import Estimator, GaussNewtonBartlett, Hutchinson
from .second_order import Params, SecondOrder
from .shared import Shared
from .state import from_state, to_state

ESTIMATORS = ("gnb", "hutchinson")


class Sophia(SecondOrder):
    """θ ← θ − ηωθ − η·clip(m / max(γh, ε), 1), Algorithm 3 of arXiv 2305.14342.

    m ← β₁m + (1 − β₁)g in every step; h ← β₂h + (1 − β₂)ĥ whenever ĥ is measured; m and h start at 0,
    and ĥ keeps its sign. The P that it tells for mixing is ``preconditioners``'; steps are clipped, and so
    not exactly by that P, wherefore a ``codec`` has no effect on them.

    ``model``, ``params`` and all that is not listed here are as for ``SecondOrder``; ``clip`` and
    ``momentum`` come on top of Sophia's own.

    Args:
        betas: β₁, β₂.
        gamma: γ > 0: the larger, the fewer entries are clipped.
        eps: ε > 0, the least γh.
        estimator: ``gnb``, of targets that the model draws, or ``hutchinson``, for which
            ``measure(loss)`` is to be called before ``loss.backward()``.
        loss: ``cross-entropy`` or ``mse``, for ``gnb``.
        refresh_interval: steps between two measurements of ĥ.
        weight_decay: ω, decoupled.
        seed: of the drawn targets, or of Hutchinson's signs.
        class_dim: for ``gnb``, as for ``KFAC``.
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
        class_dim: int | None = None,
        **shared: Unpack[Shared],
    ) -> None:
        if not (gamma > 0 and eps > 0 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError(f"gamma {gamma} and eps {eps} must be > 0, betas {betas} from 0 to below 1")
        if estimator not in ESTIMATORS:
            raise ValueError(f"unknown estimator {estimator!r}; allowed: {', '.join(ESTIMATORS)}")
        self._betas, self._gamma, self._eps = betas, gamma, eps

        def make(owned: list[nn.Parameter]) -> Estimator:
            if estimator == "gnb":
                return GaussNewtonBartlett(model, loss, owned, seed, class_dim)
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
        self._codec = None

    def preconditioners(self) -> list[LayerCurvature]:
        """max(γh/(1 − β₂ᵏ), ε) of every parameter after k measurements, and λ = 0.

        h starts at 0: divided by 1 − β₂ᵏ it is of the same size however many steps a client took, so
        that none counts more for that. The steps themselves are Algorithm 3's, by h as it is.
        """
        told = []
        for layer in super().preconditioners():
            measured = 1 - self._betas[1] ** self._state_of(layer.block)["weight"]
            told.append(LayerCurvature(layer.block, self._floored(layer.curvature.scaled(1 / measured)), 0.0))
        return told

    def warm_start(self, layers: Iterable[LayerCurvature]) -> None:
        """h ← P/γ; the next measurement makes h ← β₂h + (1 − β₂)ĥ, and the momentum goes on as it was."""
        super().warm_start([replace(layer, curvature=layer.curvature.scaled(1 / self._gamma)) for layer in layers])

    @property
    def _endless_weight(self) -> float:
        """So many measurements that 1 − β₂ᵏ is 1."""
        return math.inf

    def _update(self, state: dict[str, Any], measured: Curvature) -> None:
        beta, new = self._betas[1], measured.parts()["values"]
        old = state["curvature"]["values"] if "curvature" in state else torch.zeros_like(new)
        finite = new.isfinite()
        values = torch.where(finite, beta * old + (1 - beta) * new, old)
        state["curvature"], state["weight"] = to_state(Diagonal(values)), state.get("weight", 0.0) + 1.0
        state.pop("inverse", None)

    def _prepare(self, block: Block, state: dict[str, Any], group: dict[str, Any]) -> None:
        if "inverse" not in state:
            floored = self._floored(Diagonal(state["curvature"]["values"]))
            state["inverse"], state["damping"] = to_state(floored.map(torch.reciprocal)), 0.0

    def _precondition(self, state: dict[str, Any], gradient: Tensor, group: dict[str, Any]) -> Tensor:
        beta = self._betas[0]
        before = state.get("mean", torch.zeros_like(gradient))
        state["mean"] = beta * before + (1 - beta) * gradient
        return from_state(state["inverse"]).matmul(state["mean"]).clamp(-1.0, 1.0)

    def _floored(self, curvature: Curvature) -> Diagonal:
        values = curvature.parts()["values"]
        return Diagonal((self._gamma * values).clamp(min=self._eps))
