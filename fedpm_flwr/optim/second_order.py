"""What all second-order optimizers share: W ← W − η P⁻¹ g, with P as an estimator measures it."""

import math
import warnings
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor, nn

from ..config import check_codec
from ..curvature import (
    Block,
    Curvature,
    LayerCurvature,
    from_matrix,
    matrix_shape,
    to_matrix,
)
from ..estimators import Estimator, absolute
from ..estimators.hooks import unwrapped
from ..wire import is_exact, pack_layers
from .checks import check_model
from .inversion import CALLS_FROM_STEP, are_finite, invert
from .stale import StaleCurvature
from .state import from_state, restore, to_state

Params = Iterable[nn.Parameter] | Iterable[dict[str, Any]]


class SecondOrder(torch.optim.Optimizer):
    """W ← W − η d, with d = P⁻¹ g for parameters that have a P, and plain gradient steps for the others.

    W and its gradient g are a block's parameters as one matrix (``curvature.to_matrix``). Use it as
    any optimizer; hand it the model instead of the parameters, since it has to see more of it. In
    the order of a step: g ← g + ωW (coupled weight decay); P⁻¹; the update of all parameters together
    is shortened to the norm ``clip``; d ← μ d_before + P⁻¹g (momentum); W ← (1 − ηω) W (decoupled
    weight decay); W ← W − η d.

    Args:
        model: the network that is trained.
        params: parameters or parameter groups to train; by default all of the model's.
        lr: η, per group.
        plain_lr: η of parameters without a P, per group; by default the same. A scheduler of ``lr``
            scales it too: it is kept as its ratio to ``lr``, ``plain_lr_scale`` (1 where ``lr`` is 0).
        damping: λ ≥ 0, per group (a block's first parameter decides), added to P. Where P + λI
            cannot be inverted, not in float64 either, the block's λ is raised tenfold until it can;
            ``preconditioners`` says by which λ each block was really stepped.
        relative_damping: whether λ is in units of P's mean eigenvalue, tr(P) / n, instead of P's own.
        momentum: μ, per group.
        weight_decay: ω, per group.
        decoupled_weight_decay: whether ω shrinks W directly, or is part of the gradient.
        clip: largest Euclidean norm of the update P⁻¹g of all parameters together; 0: any.
        ema: how much less a measurement of P counts in its running average with each newer one, so
            that P = Σ emaᵗ P₍ₜ₎ / Σ emaᵗ over measurements of age t; 0: the newest alone; 1: the mean.
        refresh_interval: steps between two measurements of P.
        inverse_interval: steps between two inversions of P + λI.
        codec: name of a wire codec; if given, P is what that codec makes of it, and ``preconditioners`` has
            but the blocks that it sends. For rounds of a single step, so that the server mixes with the
            very matrix that the client stepped by.

    Raises:
        ValueError: an argument is out of range.
        CurvatureError: in ``step``, if λ is 0 and P singular, or P is not finite; names the layer.
    """

    _fills_gradients = False
    """Whether a block that lacks some of its gradients is stepped as if they were 0, or by plain steps."""

    is_newton = False
    """Whether P is the Hessian itself, so that steps with η = 1 converge quadratically."""

    _decay_is_curvature = False
    """Whether coupled weight decay, ω/2 ‖W‖² in the loss, adds its ωI to P."""

    def __init__(
        self,
        model: nn.Module,
        params: Params | None,
        estimator: Callable[[list[nn.Parameter]], Estimator],
        *,
        lr: float,
        plain_lr: float | None = None,
        damping: float,
        relative_damping: bool = False,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        clip: float = 0.0,
        ema: float,
        refresh_interval: int,
        inverse_interval: int,
        codec: str | None = None,
    ) -> None:
        if refresh_interval < 1 or inverse_interval < 1:
            raise ValueError(f"intervals must be >= 1, not {refresh_interval} and {inverse_interval}")
        if not (0 <= ema <= 1 and clip >= 0):
            raise ValueError(f"ema must be between 0 and 1, not {ema}, and clip >= 0, not {clip}")
        check_model(model, type(self).__name__)
        model = unwrapped(model)
        defaults = {
            "lr": lr,
            "plain_lr": plain_lr,
            "damping": damping,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "step": 0,
        }
        super().__init__(model.parameters() if params is None else params, defaults)
        self._relative, self._decoupled, self._clip = relative_damping, decoupled_weight_decay, clip
        self._ema, self._refresh, self._inverse = ema, refresh_interval, inverse_interval
        if codec:
            check_codec(codec)
        dtypes = {p.dtype for group in self.param_groups for p in group["params"]}
        # What arrives of P by an exact codec is P: no need to pack it before the step.
        self._codec = None if codec and all(is_exact(codec, dtype) for dtype in dtypes) else codec
        self._sent: dict[Block, LayerCurvature] | None = None  # not yet decided
        self._model = model
        self._arrays = self.model_arrays() if self._codec else {}
        self._parameters = dict(model.named_parameters())
        self._estimator = estimator([p for group in self.param_groups for p in group["params"]])
        self._unmeasured: set[Block] = set()
        self._stale = StaleCurvature()
        self._known = {p for group in self.param_groups for p in group["params"] if p.requires_grad}
        self._schedule()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of any optimizer; what is added later has no curvature, and takes plain gradient steps.

        Raises:
            ValueError: an argument is out of range.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["step"] = self._steps()
        own = group.pop("plain_lr")
        group["plain_lr_scale"] = 1.0 if own is None or not group["lr"] else own / group["lr"]
        checked = ("lr", "plain_lr_scale", "damping", "momentum", "weight_decay")
        if not all(group[key] >= 0 for key in checked):
            raise ValueError(f"{', '.join(f'{key} {group[key]}' for key in checked)}: all must be >= 0")

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
        self._check_gradients(CALLS_FROM_STEP)
        measured = self._estimator.collect()
        for block, curvature in measured.items():
            self._update(self._state_of(block), curvature)
        if self._codec and measured:
            self._step_by_what_arrives(self._codec, measured)
        if self._is_due():
            old = [b for b in self._estimator.blocks if b not in measured and "curvature" in self._state_of(b)]
            self._stale.name(old, self._parameters)
        groups = {p: group for group in self.param_groups for p in group["params"]}
        updates = self._updates(groups)
        if self._clip and updates:
            norm = torch.linalg.vector_norm(torch.stack([u.float().norm() for u in updates.values()]))
            shorter = (self._clip / norm).clamp(max=1.0)
            updates = {p: update * shorter.to(update.dtype) for p, update in updates.items()}
        for p, update in updates.items():
            self._move(p, update, groups[p])
        for group in self.param_groups:
            group["step"] += 1
        self._schedule()
        return loss

    def measure(self, loss: Tensor, outputs: object = None) -> None:
        """Measure P from the loss, before ``loss.backward()``, where the optimizer needs that; else nothing.

        Newton, LTDA and Sophia with Hutchinson's diagonal do; ``outputs``, the model's, are for
        Newton's Gauss-Newton matrix alone. Between measurements it costs nothing.
        """
        measure = getattr(self._estimator, "measure", None)
        if measure is not None:
            measure(loss, outputs)

    def preconditioners(self) -> list[LayerCurvature]:
        """P of every block that was stepped by it, as now averaged, and the λ it was stepped with."""
        states = [(block, self._state_of(block)) for block in self._estimator.blocks]
        stepped = [(block, state) for block, state in states if "inverse" in state]
        if self._sent is not None:
            return [replace(self._sent[b], damping=state["damping"]) for b, state in stepped if b in self._sent]
        return [LayerCurvature(block, _curvature(state), state["damping"]) for block, state in stepped]

    def model_arrays(self) -> dict[str, Tensor]:
        """The model that it was given as it travels, buffers too: names, shapes and dtypes alone."""
        arrays = self._model.state_dict().items()
        return {key: value.to("meta") for key, value in arrays if isinstance(value, Tensor)}

    def warm_start(self, layers: Iterable[LayerCurvature]) -> None:
        """Begin each of these blocks' running average with this P, as ``preconditioners`` of another tell it.

        It counts as endlessly many measurements would, 1/(1 − ema), so that the next one, P₍ₜ₎, makes
        P ← ema·P + (1 − ema)·P₍ₜ₎: with ema = 0 nothing is left of the given P by then, with ema = 1 it
        stays. Until then steps are preconditioned by it as it is. What was measured before is
        forgotten; blocks that the optimizer does not have are passed over. λ is the optimizer's own.
        """
        given = {layer.block.parameters: layer.curvature for layer in layers}
        for block in self._estimator.blocks:
            if block.parameters not in given:
                continue
            state, p = self._state_of(block), self._parameters[block.parameters[0]]
            for old in ("average", "inverse"):
                state.pop(old, None)
            dtype = torch.promote_types(p.dtype, torch.float32)
            state["curvature"] = to_state(given[block.parameters].to(dtype, p.device))
            state["weight"] = self._endless_weight
        self._schedule()

    @property
    def _endless_weight(self) -> float:
        """Σ emaᵗ over measurements without end."""
        return 1 / (1 - self._ema) if self._ema < 1 else math.inf

    def detach(self) -> None:
        """Take the hooks off the model; the optimizer then steps with what it has measured."""
        self._estimator.detach()
        self._stale.is_meant = True

    def __getstate__(self) -> dict[str, Any]:
        """Refused, for ``copy`` and ``pickle``: hooks on the model's layers are not copied with it.

        Raises:
            TypeError: always.
        """
        name = type(self).__name__
        raise TypeError(
            f"{name} cannot be copied or pickled: it watches the layers of one model. Make another, "
            f"{name}(copied_model, ...), and give it load_state_dict(optimizer.state_dict())"
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of any optimizer; curvature keeps the precision that it was saved with."""
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        own = chain.from_iterable(group["params"] for group in self.param_groups)
        for index, p in zip(saved, own, strict=True):
            restore(self.state.get(p, {}), state_dict["state"].get(index, {}), p.device)
        self._schedule()

    def _check_gradients(self, stacklevel: int) -> None:
        """What gradients say against what was measured, before it is collected; nothing, but in ``FOOF``."""

    def _update(self, state: dict[str, Any], measured: Curvature) -> None:
        """Take a measurement into the running average, part by part: K-FAC's two factors each for itself."""
        before = self._ema * state.get("weight", 0.0)
        state["weight"] = before + 1.0
        parts = measured.parts()
        if "curvature" in state:
            # A measurement that is not finite, as of a step that a GradScaler skipped, is passed
            # over; decided on the device, which nothing has to wait for.
            old = from_state(state.get("average", state["curvature"])).parts()
            finite = are_finite(parts)
            parts = {
                name: torch.where(
                    finite, torch.lerp(old[name], part.to(old[name]), 1 / state["weight"]), old[name]
                )
                for name, part in parts.items()
            }
        new: Curvature = type(measured)(**parts)
        if self._estimator.signed:
            state["average"] = to_state(new)
            new = absolute(new)
        elif self._codec:
            state["average"] = to_state(new)
        state["curvature"] = to_state(new)

    def _step_by_what_arrives(self, codec: str, measured: Collection[Block]) -> None:
        """Let P of these blocks be as the server gets it; of those that are not sent it stays as it is."""
        groups = {p: group for group in self.param_groups for p in group["params"]}
        layers = []
        for block in measured:
            curvature = _curvature(self._state_of(block))
            damping = self._damping(block, curvature, groups[self._parameters[block.parameters[0]]])
            layers.append(LayerCurvature(block, curvature, damping))
        new = {layer.block: layer for layer in pack_layers(layers, codec, self._arrays)}
        for block, layer in new.items():
            self._state_of(block)["curvature"] = to_state(layer.curvature)
        self._sent = {b: layer for b, layer in (self._sent or {}).items() if b not in measured} | new

    def _prepare(self, block: Block, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Invert P + λI, if that is due."""
        if "inverse" not in state or self._steps() % self._inverse == 0:
            curvature = _curvature(state)
            inverse, state["damping"] = invert(curvature, self._damping(block, curvature, group), block.name)
            state["inverse"] = to_state(inverse)

    def _damping(self, block: Block, curvature: Curvature, group: dict[str, Any]) -> float:
        """λ of a block, in P's own unit."""
        damping: float = group["damping"]
        if self._relative:
            shape = matrix_shape([self._parameters[key].shape for key in block.parameters])
            # Without any curvature, as for inputs that are all 0, λ is absolute: nothing to be relative to.
            damping *= float(curvature.diagonal(*shape).mean()) or 1.0
        if self._decay_is_curvature and not self._decoupled:
            damping += group["weight_decay"]
        return damping

    def _precondition(self, state: dict[str, Any], gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """P⁻¹g of one block, a matrix."""
        return from_state(state["inverse"]).matmul(gradient)

    def _updates(self, groups: dict[nn.Parameter, dict[str, Any]]) -> dict[nn.Parameter, Tensor]:
        """What each parameter is to be moved by, but for its learning rate: P⁻¹g, or g."""
        gradients = {p: self._gradient(p, group) for p, group in groups.items() if p.grad is not None}
        self._name_late(gradients)
        updates: dict[nn.Parameter, Tensor] = {}
        for block in self._estimator.blocks:
            owned = [self._parameters[key] for key in block.parameters]
            state = self._state_of(block)
            given = [p in gradients for p in owned]
            if (all(given) or (self._fills_gradients and any(given))) and self._is_measured(block, state):
                self._prepare(block, state, groups[owned[0]])
                gradient = to_matrix([gradients.pop(p, torch.zeros_like(p)) for p in owned])
                matrix = self._precondition(state, gradient, groups[owned[0]])
                parts = zip(owned, from_matrix(matrix, [p.shape for p in owned]), given, strict=True)
                updates |= {p: part for p, part, has_gradient in parts if has_gradient}
        return updates | {p: g * groups[p]["plain_lr_scale"] for p, g in gradients.items()}

    def _gradient(self, p: nn.Parameter, group: dict[str, Any]) -> Tensor:
        assert p.grad is not None
        coupled = group["weight_decay"] and not self._decoupled
        return p.grad.add(p, alpha=group["weight_decay"]) if coupled else p.grad

    def _move(self, p: nn.Parameter, update: Tensor, group: dict[str, Any]) -> None:
        if group["momentum"]:
            before = self.state[p].get("momentum")
            update = update.clone() if before is None else before.mul_(group["momentum"]).add_(update)
            self.state[p]["momentum"] = update
        if group["weight_decay"] and self._decoupled:
            p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(update.to(p.dtype), alpha=-group["lr"])

    def _state_of(self, block: Block) -> dict[str, Any]:
        """A block's state, kept under its first parameter."""
        state: dict[str, Any] = self.state[self._parameters[block.parameters[0]]]
        return state

    def _is_measured(self, block: Block, state: dict[str, Any]) -> bool:
        measured = "curvature" in state
        if not measured and block not in self._unmeasured:
            self._unmeasured.add(block)
            warnings.warn(
                f"layer {block.name!r} has a gradient but its curvature was not measured in training mode with "
                "gradients enabled (is it in evaluation mode, or in a reentrant checkpoint, or "
                "optimizer.measure(loss) not called before loss.backward()?): it takes plain gradient steps",
                stacklevel=CALLS_FROM_STEP + 1,
            )
        return measured

    def _name_late(self, gradients: Collection[nn.Parameter]) -> None:
        late = [p for p in gradients if p not in self._known]
        if late:
            self._known.update(late)
            warnings.warn(
                f"{len(late)} parameters were frozen or not there when the optimizer was made: they take plain "
                "gradient steps, and are averaged",
                stacklevel=CALLS_FROM_STEP + 1,
            )

    def _steps(self) -> int:
        return int(self.param_groups[0]["step"])

    def _is_due(self) -> bool:
        """Whether the coming step refreshes P."""
        return self._steps() % self._refresh == 0

    def _schedule(self) -> None:
        """Measure in the coming forward passes if the next step refreshes P, or where there is none yet."""
        due, blocks = self._is_due(), self._estimator.blocks
        self._estimator.recording = [b for b in blocks if due or "curvature" not in self._state_of(b)]


def _curvature(state: dict[str, Any]) -> Curvature:
    curvature = from_state(state["curvature"])
    assert isinstance(curvature, Curvature)
    return curvature
