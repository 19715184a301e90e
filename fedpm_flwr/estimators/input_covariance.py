"""FOOF's statistic: the uncentred second moment of a layer's inputs (Benzing 2022)."""

import warnings
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..curvature import Block


@dataclass
class _Sum:
    """Σ x xᵀ and the number of x in it."""

    total: Tensor | None = None
    count: int = 0

    def add(self, x: Tensor) -> None:
        gram = x.T @ x
        self.total = gram if self.total is None else self.total + gram
        self.count += x.shape[0]


@dataclass
class _Watched:
    block: Block
    handle: RemovableHandle
    has_bias: bool
    sums: _Sum = field(default_factory=_Sum)


class InputCovariance:
    """Measures A = E[x xᵀ] for the Linear and Conv2d layers of a model while it trains.

    x is the layer's input with a one appended where the layer has a trainable bias; for a
    convolution, x is an unfolded patch. The mean is over the batch and all positions, so A's side
    is in(+1), or in · kernel height · kernel width (+1). A is float32, float64 where x is.

    Only forwards that training differentiates count: not those under ``no_grad``, not those in
    evaluation mode, and not recomputation by checkpointing during the backward pass.

    ``recording`` holds the layers to measure; the rest pass at no cost. At first it is all of them.

    Layers that it cannot measure, and parameters that modules share, are named in one warning;
    their parameters belong to no block.

    Args:
        model: hooks are put on its layers until ``detach`` is called.
        max_side: layers with more inputs than this are left out.
        parameters: those to measure curvature for; by default all of the model's. Frozen ones never are.
    """

    def __init__(
        self, model: nn.Module, max_side: int = 8192, parameters: Iterable[nn.Parameter] | None = None
    ) -> None:
        chosen = {p for p in (model.parameters() if parameters is None else parameters) if p.requires_grad}
        self._watched: dict[str, _Watched] = {}
        self._left_out: list[str] = []
        shared = _shared_parameters(model)
        for name, module in model.named_modules():
            self._watch(name, module, chosen, shared, max_side)
        self.recording: Collection[Block] = self.blocks
        if self._left_out:
            warnings.warn(f"no curvature for {', '.join(self._left_out)}: averaged instead of mixed", stacklevel=2)

    @property
    def blocks(self) -> list[Block]:
        """The measured layers, in the model's order."""
        return [watched.block for watched in self._watched.values()]

    def collect(self) -> dict[Block, Tensor]:
        """A of each layer over all inputs seen since the last call; layers that saw none are left out."""
        moments = {}
        for watched in self._watched.values():
            sums, watched.sums = watched.sums, _Sum()
            if sums.total is not None and sums.count:
                moments[watched.block] = sums.total / sums.count
        return moments

    def detach(self) -> None:
        """Take the hooks off the model."""
        for watched in self._watched.values():
            watched.handle.remove()

    def _watch(
        self, name: str, module: nn.Module, chosen: set[nn.Parameter], shared: set[nn.Parameter], max_side: int
    ) -> None:
        own = {key: p for key, p in module.named_parameters(recurse=False) if p in chosen}
        if not own:
            return
        reason = _why_not(module, own, shared, max_side)
        if reason:
            self._left_out.append(f"{name or type(module).__name__} ({reason})")
            return
        prefix = f"{name}." if name else ""
        block = Block(name, tuple(prefix + key for key in ("weight", "bias") if key in own))

        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if (
                watched.block in self.recording
                and layer.training
                and torch.is_grad_enabled()
                and not _in_backward()
            ):
                self._record(watched, layer, inputs[0])

        watched = _Watched(block, module.register_forward_pre_hook(hook), "bias" in own)
        self._watched[name] = watched

    @staticmethod
    @torch.no_grad()
    def _record(watched: _Watched, layer: nn.Module, inputs: Tensor) -> None:
        with torch.autocast(inputs.device.type, enabled=False):
            x = inputs.detach()
            x = x if x.dtype == torch.float64 else x.float()
            x = unfold(layer, x) if isinstance(layer, nn.Conv2d) else x.reshape(-1, x.shape[-1])
            if watched.has_bias:
                x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
            watched.sums.add(x)


def unfold(layer: nn.Conv2d, images: Tensor) -> Tensor:
    """The patches that a convolution sees, [batch · positions, channels · kernel height · kernel width].

    Columns are in the order of ``layer.weight.flatten(1)``. Images are [batch, channels, height,
    width] or [channels, height, width].
    """
    images = images if images.ndim == 4 else images.unsqueeze(0)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    # The paddings of the last dimension first, both sides, with padding="same" worked out.
    padded = F.pad(images, layer._reversed_padding_repeated_twice, mode=mode)
    patches = F.unfold(padded, layer.kernel_size, layer.dilation, stride=layer.stride)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def _why_not(module: nn.Module, own: dict[str, nn.Parameter], shared: set[nn.Parameter], max_side: int) -> str:
    """Why a module with these trainable parameters gets no curvature; empty if it does."""
    if type(module) not in (nn.Linear, nn.Conv2d):
        return type(module).__name__
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return "grouped convolution"
    if any(p in shared for p in own.values()):
        return "shared parameter"
    if "weight" not in own:
        return "frozen weight"
    side = own["weight"][0].numel() + ("bias" in own)
    return f"{side} inputs, more than {max_side}" if side > max_side else ""


def _shared_parameters(model: nn.Module) -> set[nn.Parameter]:
    owners = Counter(p for module in model.modules() for p in module._parameters.values() if p is not None)
    return {p for p, count in owners.items() if count > 1}


def _in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread, as when a checkpoint recomputes."""
    return torch._C._current_graph_task_id() != -1
