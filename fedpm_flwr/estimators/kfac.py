"""K-FAC's factors: the second moments of a layer's inputs and of the gradients by its outputs."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..curvature import Block, Curvature, Kronecker, KroneckerRight
from .hooks import Handles, Hook, unwrapped
from .input_covariance import InputCovariance
from .layers import CONVOLUTIONS, Layer
from .likelihood import as_logits, check_loss, exact_gradients, sampled_gradient

FISHERS = ("exact", "sampled", "empirical")
"""Whose gradients the left factor is of (``KroneckerFactors``)."""


class KroneckerFactors:
    """Measures P = G ⊗ A of Linear and convolutional layers (Martens and Grosse 2015; Grosse and Martens 2016).

    A is ``InputCovariance``'s: the mean of x xᵀ over examples and positions. G = Σ b bᵀ / m, over
    the m examples, summed over positions, with b the gradient of an example's loss by the layer's
    output there. G ⊗ A is then in the unit of the loss's Hessian, the loss being a mean over examples.

    ``fisher`` says whose gradients: ``sampled``: of targets drawn from the model's own distribution,
    an unbiased estimate of G, at the cost of one more backward pass; ``exact``: their expectation,
    one more backward pass for each class (times the positions of outputs that have positions);
    ``empirical``: of the loss that the training loop itself
    runs backward, at no cost, but it is the Fisher matrix only where the model fits its labels, and
    it needs that loss to be the plain mean over the batch (not scaled by a GradScaler, not divided
    by a number of accumulation steps).

    What is not listed here is as for ``InputCovariance``.

    Args:
        model: hooks are put on it and its layers until ``detach`` is called.
        fisher: one of ``FISHERS``.
        loss: ``cross-entropy`` or ``mse``, the mean over the batch, as torch's functions of these
            names; of no matter for ``empirical``.
        max_side: layers with more inputs or outputs than this are left out.
        seed: of the drawn targets.
        class_dim: the dimension of the outputs that holds the classes, if there are more than two: 1 or -1.

    Raises:
        ValueError: an argument is not allowed.
    """

    signed = False

    def __init__(
        self,
        model: nn.Module,
        fisher: str = "sampled",
        loss: str = "cross-entropy",
        *,
        max_side: int = 8192,
        parameters: Iterable[nn.Parameter] | None = None,
        position_stride: int = 1,
        seed: int = 0,
        class_dim: int | None = None,
        stacklevel: int = 2,
    ) -> None:
        if fisher not in FISHERS:
            raise ValueError(f"unknown fisher {fisher!r}; allowed: {', '.join(FISHERS)}")
        self._fisher, self._loss, self._seed = fisher, check_loss(loss), seed
        self._class_dim = class_dim
        self._generator: torch.Generator | None = None
        self._inputs = InputCovariance(
            model, max_side, parameters, position_stride, (nn.Linear, *CONVOLUTIONS), max_side, stacklevel + 1
        )
        self._totals: dict[Block, Tensor] = {}
        self._examples = 0
        self._forward = _Forward()
        self._pending: list[tuple[Layer, nn.Module, torch.autograd.graph.GradientEdge]] = []
        self._handles = Handles(self)
        for layer in self._inputs.layers:
            for module in layer.modules:
                self._handles.add(module.register_forward_hook(Hook(self, "_note_output", layer)))
        self._handles.add(unwrapped(model).register_forward_hook(Hook(self, "_after_forward")))

    @property
    def blocks(self) -> list[Block]:
        """The measured layers, in the model's order."""
        return self._inputs.blocks

    @property
    def recording(self) -> Collection[Block]:
        """The layers to measure in the coming forwards."""
        return self._inputs.recording

    @recording.setter
    def recording(self, blocks: Collection[Block]) -> None:
        self._inputs.recording = blocks

    def collect(self) -> dict[Block, Curvature]:
        """P of each layer over all that was seen since the last call; layers that saw nothing are left out."""
        found: dict[Block, Curvature] = {}
        for block, inputs in self._inputs.collect().items():
            if block in self._totals and self._examples:
                assert isinstance(inputs, KroneckerRight)
                left = self._totals[block] / self._examples
                found[block] = Kronecker(left, inputs.factor)
        self._totals, self._examples, self._pending = {}, 0, []
        return found

    def detach(self) -> None:
        """Take the hooks off the model, as also happens when the estimator is no longer used."""
        self._handles.remove()
        self._inputs.detach()

    def _note_output(self, layer: Layer, module: nn.Module, args: object, output: Tensor) -> None:
        if layer.block not in self.recording or not output.requires_grad:
            return
        if self._fisher == "empirical":
            output.register_hook(partial(self._add_empirical, layer, module, self._forward))
        else:  # the place in the graph, not the tensor: an activation may change that in place
            self._pending.append((layer, module, torch.autograd.graph.get_gradient_edge(output)))

    def _after_forward(self, model: nn.Module, args: object, outputs: object) -> None:
        if not self.recording:
            return
        logits = as_logits(outputs, None if self._fisher == "empirical" else self._loss, self._class_dim)
        examples = logits[..., 0].numel()
        self._examples += examples
        if self._fisher == "empirical":
            self._forward.examples, self._forward = examples, _Forward()
            return
        if self._pending and examples:
            for direction in self._directions(logits):
                edges = [edge for _, _, edge in self._pending]
                with torch.autocast(logits.device.type, enabled=False):
                    gradients = torch.autograd.grad(logits, edges, direction, retain_graph=True, allow_unused=True)
                for (layer, module, _), gradient in zip(self._pending, gradients, strict=True):
                    if gradient is not None:
                        self._add(layer, module, gradient, 1.0)
        self._pending = []

    def _directions(self, logits: Tensor) -> Iterable[Tensor]:
        if self._fisher == "exact":
            return exact_gradients(logits, self._loss)
        if self._generator is None or self._generator.device != logits.device:
            self._generator = torch.Generator(logits.device).manual_seed(self._seed)
        return [sampled_gradient(logits.detach(), self._loss, self._generator)]

    def _add_empirical(self, layer: Layer, module: nn.Module, forward: "_Forward", gradient: Tensor) -> None:
        # The loss is a mean: an example's own gradient is as many times larger as there are examples.
        self._add(layer, module, gradient, float(forward.examples))

    @torch.no_grad()
    def _add(self, layer: Layer, module: nn.Module, gradient: Tensor, scale: float) -> None:
        b = _outputs(module, gradient if gradient.dtype == torch.float64 else gradient.float())
        with torch.autocast(b.device.type, enabled=False):
            gram = scale**2 * (b.mT @ b)
        total = self._totals.get(layer.block)
        self._totals[layer.block] = gram if total is None else total + gram


@dataclass
class _Forward:
    """One forward pass of the whole model, and how many examples were in it."""

    examples: int = 0


def _outputs(module: nn.Module, gradient: Tensor) -> Tensor:
    """The gradient by a layer's output, one position a row: [n, out], or [groups, n, out / groups]."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return gradient.reshape(-1, gradient.shape[-1])
    channels = -1 - len(module.kernel_size)
    rows = gradient.movedim(channels, -1).reshape(-1, module.out_channels)
    return rows if module.groups == 1 else rows.reshape(len(rows), module.groups, -1).movedim(1, 0)
