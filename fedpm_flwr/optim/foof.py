"""FOOF (Benzing 2022): each layer's gradient times the inverse second moment of its inputs."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn

from ..curvature import Block, CurvatureError, KroneckerRight, LayerCurvature, from_matrix, to_matrix
from ..curvature.base import cholesky
from ..estimators import InputCovariance
from ..wire import get_codec

_RAISE_DAMPING_BY = 10.0
_MAX_RAISES = 12
_CALLS_FROM_STEP = 5
"""From a method called by ``step``, through torch's two wrappers of it, to the caller of ``step``."""


class FOOF(torch.optim.Optimizer):
    """W ← W − η g (A + λI)⁻¹ for each Linear and Conv2d layer, W ← W − η g for everything else.

    W and its gradient g are [out, in(+1)], the bias as last column; A is the running average of
    E[x xᵀ] over the layer's inputs x (``InputCovariance``). Use it as any optimizer; hand it the
    model instead of the parameters, since it has to see the layers' inputs.

    Args:
        model: the network that is trained.
        params: parameters or parameter groups to train; by default all of the model's.
        lr: η, per group.
        damping: λ ≥ 0, per group (a layer's weight decides); unit: a squared activation. Where
            A + λI has no Cholesky factor, not in float64 either, the layer's λ is raised tenfold
            until it has; ``preconditioners`` says by which λ each layer was really stepped.
        ema: how much less a measurement of A counts in its running average with each newer one, so
            that A = Σ emaᵗ A₍ₜ₎ / Σ emaᵗ over measurements of age t; 0: the newest alone; 1: the mean.
        refresh_interval: steps between two measurements of A.
        inverse_interval: steps between two inversions of A + λI.
        max_factor_side: layers with more inputs are stepped along their plain gradient.
        codec: name of a wire codec; if given, A is what that codec makes of it. For rounds of a
            single step, so that the server mixes with the very matrix that the client stepped by.

    Raises:
        ValueError: an argument is out of range.
        CurvatureError: in ``step``, if λ is 0 and A singular, or A is not finite; names the layer.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]] | None = None,
        *,
        lr: float = 0.1,
        damping: float = 1.0,
        ema: float = 0.95,
        refresh_interval: int = 5,
        inverse_interval: int = 10,
        max_factor_side: int = 8192,
        codec: str | None = None,
    ) -> None:
        if refresh_interval < 1 or inverse_interval < 1:
            raise ValueError(f"intervals must be >= 1, not {refresh_interval} and {inverse_interval}")
        if not 0 <= ema <= 1:
            raise ValueError(f"ema must be between 0 and 1, not {ema}")
        super().__init__(
            model.parameters() if params is None else params, {"lr": lr, "damping": damping, "step": 0}
        )
        for group in self.param_groups:
            if not (group["lr"] >= 0 and group["damping"] >= 0):
                raise ValueError(f"lr {group['lr']} and damping {group['damping']} must be >= 0")
        self._ema, self._refresh, self._inverse = ema, refresh_interval, inverse_interval
        self._codec = get_codec(codec) if codec else None
        self._parameters = dict(model.named_parameters())
        owned = [p for group in self.param_groups for p in group["params"]]
        self._estimator = InputCovariance(model, max_factor_side, owned, stacklevel=3)
        self._unmeasured: set[Block] = set()
        self._schedule()
        self.register_load_state_dict_post_hook(_after_loading)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step; a closure is called first, with gradients enabled, and its loss returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update_factors()
        groups = {p: group for group in self.param_groups for p in group["params"] if p.grad is not None}
        for block in self._estimator.blocks:
            owned = [self._parameters[key] for key in block.parameters]
            if all(p in groups for p in owned) and self._is_measured(block):
                self._step_layer(block, owned, [groups.pop(p) for p in owned])
        for p, group in groups.items():
            p.sub_(p.grad, alpha=group["lr"])
        for group in self.param_groups:
            group["step"] += 1
        self._schedule()
        return loss

    def preconditioners(self) -> list[LayerCurvature]:
        """A of every layer that was stepped by it, as now averaged, and the λ it was stepped with."""
        found = []
        for block in self._estimator.blocks:
            state = self._state_of(block)
            if "inverse" in state:
                found.append(LayerCurvature(block, KroneckerRight(state["factor"]), state["damping"]))
        return found

    def detach(self) -> None:
        """Take the hooks off the model; the optimizer then steps with what it has measured."""
        self._estimator.detach()

    def _state_of(self, block: Block) -> dict[str, Any]:
        """A layer's state, kept under its weight."""
        state: dict[str, Any] = self.state[self._parameters[block.parameters[0]]]
        return state

    def _is_measured(self, block: Block) -> bool:
        measured = "factor" in self._state_of(block)
        if not measured and block not in self._unmeasured:
            self._unmeasured.add(block)
            warnings.warn(
                f"layer {block.name!r} has a gradient but its inputs were not seen in training mode with "
                "gradients enabled (is it in evaluation mode, or in a reentrant checkpoint?): it takes "
                "plain gradient steps",
                stacklevel=_CALLS_FROM_STEP,
            )
        return measured

    def _steps(self) -> int:
        return int(self.param_groups[0]["step"])

    def _schedule(self) -> None:
        """Measure in the coming forward passes if the next step refreshes A, or where there is none yet."""
        due = self._steps() % self._refresh == 0
        self._estimator.recording = {b for b in self._estimator.blocks if due or "factor" not in self._state_of(b)}

    def _update_factors(self) -> None:
        for block, measured in self._estimator.collect().items():
            if "factor" in self._state_of(block) and not torch.isfinite(measured).all():
                continue  # as after a step that a GradScaler skipped; measured again at the next refresh
            state = self._state_of(block)
            old_weight = self._ema * state.get("weight", 0.0)
            state["weight"] = old_weight + 1.0
            new = measured if not old_weight else (old_weight * state["factor"] + measured) / state["weight"]
            if self._codec is not None:
                new = self._codec.unpack(self._codec.pack(new), len(new)).to(new)
            state["factor"] = new

    def _step_layer(self, block: Block, owned: list[nn.Parameter], groups: list[dict[str, Any]]) -> None:
        state = self._state_of(block)
        if "inverse" not in state or self._steps() % self._inverse == 0:
            state["inverse"], state["damping"] = _invert(state["factor"], groups[0]["damping"], block.name)
        gradient = to_matrix([_gradient(p) for p in owned])
        direction = gradient.to(state["inverse"].dtype) @ state["inverse"]
        for p, part, group in zip(owned, from_matrix(direction, [p.shape for p in owned]), groups, strict=True):
            p.sub_(part.to(p.dtype), alpha=group["lr"])


def _after_loading(optimizer: torch.optim.Optimizer) -> None:
    """torch casts loaded state to the parameters' dtype; curvature stays float32 at least."""
    assert isinstance(optimizer, FOOF)
    for state in optimizer.state.values():
        for key in {"factor", "inverse"} & set(state):
            state[key] = state[key] if state[key].dtype == torch.float64 else state[key].float()
    optimizer._schedule()


def _gradient(p: nn.Parameter) -> Tensor:
    assert p.grad is not None
    return p.grad


def _invert(factor: Tensor, damping: float, layer: str) -> tuple[Tensor, float]:
    """(A + λI)⁻¹ in A's dtype, and λ, raised until there is one."""
    if not torch.isfinite(factor).all():
        raise CurvatureError(f"layer {layer!r}: its inputs are not finite; has training diverged?")
    for raised in range(_MAX_RAISES + 1):
        used = damping * _RAISE_DAMPING_BY**raised
        try:
            inverse = torch.cholesky_inverse(cholesky(KroneckerRight(factor).damped(used).factor))
        except CurvatureError as error:
            if damping == 0:
                raise CurvatureError(f"layer {layer!r}: {error}, and its damping is 0") from error
            continue
        if used != damping:
            warnings.warn(
                f"layer {layer!r}: damping raised from {damping} to {used}", stacklevel=_CALLS_FROM_STEP + 1
            )
        return inverse.to(factor.dtype), used
    raise CurvatureError(f"layer {layer!r}: not positive definite even with damping {used}")
