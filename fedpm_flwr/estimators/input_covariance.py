"""FOOF's statistic: the uncentred second moment of a layer's inputs (Benzing 2022)."""

import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..curvature import Block, Curvature, Diagonal, KroneckerRight
from .hooks import Handles, Hook, unwrapped
from .layers import Layer, find_layers, inputs_of, rows_of

_STRIP = 512


@dataclass
class _Moments:
    """Of one layer: Σ x xᵀ of each of its inputs and the number of x in it; whether all its inputs were one."""

    layer: Layer
    totals: list[Tensor] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    alike: bool = True


class InputCovariance:
    """Measures A = E[x xᵀ] for the layers of a model while it trains.

    x is the layer's input with a one appended where the layer has a trainable bias; for a
    convolution, x is an unfolded patch. The mean is over the batch and all positions, so A's side
    is in(+1), or in · kernel height · kernel width (+1). A is float32, float64 where x is.

    | layer | P |
    | --- | --- |
    | Linear, Conv1d, Conv2d, Conv3d | ``KroneckerRight(A)`` |
    | the same with groups | ``KroneckerRight``, a matrix for each group |
    | Embedding, whose inputs are one-hot | ``Diagonal``: how often each row is looked up |
    | MultiheadAttention, its packed projection | ``KroneckerRight``, of query, key, value each or of all |

    Tied layers, and modules that are called several times, count all their inputs.

    Only forwards in training mode with gradients enabled count: not those under ``no_grad``, not
    those in evaluation mode, and not recomputation by checkpointing during the backward pass. (So a
    layer inside ``checkpoint(…, use_reentrant=True)`` is not measured at all: its first forward is
    under ``no_grad``.)

    ``recording`` holds the layers to measure; the rest pass at no cost. At first it is all of them.

    Layers that it cannot measure are named in one warning; their parameters belong to no block.

    Args:
        model: hooks are put on its layers until ``detach`` is called.
        max_side: layers with more inputs than this are left out.
        parameters: those to measure curvature for; by default all of the model's. Frozen ones never are.
        position_stride: s: only every s-th position of a sequence, and of an image in each
            direction, is measured, from a place that moves on with each measurement.
        only: the types of layers to measure; by default all that it can.
        max_outputs: layers with more outputs than this are left out; by default none.
        stacklevel: how many calls up the warning points.
    """

    signed = False

    def __init__(
        self,
        model: nn.Module,
        max_side: int = 8192,
        parameters: Iterable[nn.Parameter] | None = None,
        position_stride: int = 1,
        only: Collection[type[nn.Module]] | None = None,
        max_outputs: int | None = None,
        stacklevel: int = 2,
    ) -> None:
        model = unwrapped(model)
        chosen = {p for p in (model.parameters() if parameters is None else parameters) if p.requires_grad}
        layers, left_out = find_layers(model, chosen, max_side, only, max_outputs)
        self.layers = layers
        self.recording: Collection[Block] = self.blocks
        self._moments = {layer.block: _Moments(layer) for layer in layers}
        self._stride, self._measured = position_stride, 0
        self._handles = Handles(self)
        for layer in layers:
            for module in layer.modules:
                hook = Hook(self, "_record", layer)
                self._handles.add(module.register_forward_pre_hook(hook, with_kwargs=True))
        if left_out:
            names = ", ".join(left_out)
            warnings.warn(f"no curvature for {names}: averaged instead of mixed", stacklevel=stacklevel)

    @property
    def blocks(self) -> list[Block]:
        """The measured layers, in the model's order."""
        return [layer.block for layer in self.layers]

    def lookups(self) -> dict[Block, Tensor]:
        """How often each row of each embedding was looked up since the last ``collect``; of those in use."""
        used = {block: moments for block, moments in self._moments.items() if any(moments.counts)}
        return {b: m.totals[0] for b, m in used.items() if isinstance(m.layer.modules[0], nn.Embedding)}

    def leave_out(self, block: Block) -> None:
        """Measure this layer no more, and forget what was measured of it."""
        self.layers = [layer for layer in self.layers if layer.block != block]
        self.recording = [other for other in self.recording if other != block]
        del self._moments[block]

    def collect(self) -> dict[Block, Curvature]:
        """P of each layer over all inputs seen since the last call; layers that saw none are left out."""
        found = {block: _curvature(moments) for block, moments in self._moments.items() if any(moments.counts)}
        self._moments = {layer.block: _Moments(layer) for layer in self.layers}
        self._measured += 1
        return found

    def detach(self) -> None:
        """Take the hooks off the model, as also happens when the estimator is no longer used."""
        self._handles.remove()

    @torch.no_grad()
    def _record(
        self, layer: Layer, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
    ) -> None:
        if layer.block not in self.recording:
            return
        moments = self._moments[layer.block]
        inputs = list(inputs_of(module, args, kwargs))
        if not all(x.numel() for x in inputs):
            return
        alike = all(x is inputs[0] for x in inputs)
        with torch.autocast(inputs[0].device.type, enabled=False):
            sums = [self._sum(layer, module, x) for x in (inputs[:1] if alike else inputs)]
        sums = sums * len(inputs) if alike else sums
        moments.alike = moments.alike and alike
        if not moments.totals:
            moments.totals, moments.counts = [total for total, _ in sums], [count for _, count in sums]
            return
        moments.totals = [old + new for old, (new, _) in zip(moments.totals, sums, strict=True)]
        moments.counts = [old + new for old, (_, new) in zip(moments.counts, sums, strict=True)]

    def _sum(self, layer: Layer, module: nn.Module, x: Tensor) -> tuple[Tensor, int]:
        """Σ x xᵀ of one input, [n, n] or [groups, n, n]; of an embedding how often each row is in it."""
        if isinstance(module, nn.Embedding):
            dtype = torch.float64 if module.weight.dtype == torch.float64 else torch.float32
            ones = torch.ones(x.numel(), dtype=dtype, device=x.device)
            return ones.new_zeros(module.num_embeddings).index_add_(0, x.flatten(), ones), x.numel()
        x = rows_of(module, x.detach(), self._stride, self._measured)
        x = x if x.dtype == torch.float64 else x.float()
        gram = _gram(x)
        if layer.has_bias:  # as if x had a one appended, without copying it
            gram = F.pad(gram, (0, 1, 0, 1))
            gram[..., -1, :-1] = gram[..., :-1, -1] = x.sum(dim=-2)
            gram[..., -1, -1] = x.shape[-2]
        return gram, x.shape[-2]


def _gram(x: Tensor) -> Tensor:
    """xᵀx, of which only one triangle is computed, strip by strip: for a large side half of the work."""
    side = x.shape[-1]
    if side <= _STRIP:
        return x.mT @ x
    gram = x.new_empty(*x.shape[:-2], side, side)
    for start in range(0, side, _STRIP):
        end = start + _STRIP
        gram[..., start:end, start:] = x[..., start:end].mT @ x[..., start:]
        gram[..., end:, start:end] = gram[..., start:end, end:].mT
    return gram


def _curvature(moments: _Moments) -> Curvature:
    totals = moments.totals[:1] if moments.alike else moments.totals
    means = [total.div_(max(count, 1)) for total, count in zip(totals, moments.counts, strict=False)]
    if means[0].ndim == 1:
        return Diagonal(means[0][:, None])
    return KroneckerRight(means[0] if moments.alike else torch.stack(means))
