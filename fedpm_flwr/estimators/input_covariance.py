"""FOOF's statistic: the uncentred second moment of a layer's inputs (Benzing 2022)."""

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..curvature import Block


@dataclass
class _Watched:
    """A layer under observation: Σ x xᵀ and the number of x in it."""

    block: Block
    has_bias: bool
    total: Tensor | None = None
    count: int = 0


class InputCovariance:
    """Measures A = E[x xᵀ] for the Linear and Conv2d layers of a model while it trains.

    x is the layer's input with a one appended where the layer has a trainable bias; for a
    convolution, x is an unfolded patch. The mean is over the batch and all positions, so A's side
    is in(+1), or in · kernel height · kernel width (+1). A is float32, float64 where x is.

    Only forwards in training mode with gradients enabled count: not those under ``no_grad``, not
    those in evaluation mode, and not recomputation by checkpointing during the backward pass. (So a
    layer inside ``checkpoint(…, use_reentrant=True)`` is not measured at all: its first forward is
    under ``no_grad``.)

    ``recording`` holds the layers to measure; the rest pass at no cost. At first it is all of them.

    Layers that it cannot measure, and parameters that modules share, are named in one warning;
    their parameters belong to no block.

    Args:
        model: hooks are put on its layers until ``detach`` is called.
        max_side: layers with more inputs than this are left out.
        parameters: those to measure curvature for; by default all of the model's. Frozen ones never are.
        stacklevel: how many calls up the warning points.
    """

    def __init__(
        self,
        model: nn.Module,
        max_side: int = 8192,
        parameters: Iterable[nn.Parameter] | None = None,
        stacklevel: int = 2,
    ) -> None:
        chosen = {p for p in (model.parameters() if parameters is None else parameters) if p.requires_grad}
        self._watched: list[_Watched] = []
        self._handles: list[RemovableHandle] = []
        self._finalizer = weakref.finalize(self, _remove, self._handles)
        self._left_out: list[str] = []
        shared = _shared_parameters(model)
        for name, module in model.named_modules():
            self._watch(name, module, chosen, shared, max_side)
        self.recording: Collection[Block] = self.blocks
        if self._left_out:
            warnings.warn(
                f"no curvature for {', '.join(self._left_out)}: averaged instead of mixed", stacklevel=stacklevel
            )

    @property
    def blocks(self) -> list[Block]:
        """The measured layers, in the model's order."""
        return [watched.block for watched in self._watched]

    def collect(self) -> dict[Block, Tensor]:
        """A of each layer over all inputs seen since the last call; layers that saw none are left out."""
        moments = {}
        for watched in self._watched:
            if watched.total is not None and watched.count:
                moments[watched.block] = watched.total / watched.count
            watched.total, watched.count = None, 0
        return moments

    def detach(self) -> None:
        """Take the hooks off the model, as also happens when the estimator is no longer used."""
        self._finalizer()

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
        self._watched.append(_Watched(block, "bias" in own))
        hook = _Hook(self, self._watched[-1])
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))


class _Hook:
    """Sums up a layer's inputs. It holds nothing alive, and does nothing on a copy of the model."""

    def __init__(self, estimator: InputCovariance, watched: _Watched) -> None:
        self._estimator = weakref.ref(estimator)
        self._watched = watched

    def __reduce__(self) -> tuple[Callable[[], "_Idle"], tuple[()]]:
        return _Idle, ()  # what a copied or saved model gets instead

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        estimator = self._estimator()
        if (
            estimator is not None
            and self._watched.block in estimator.recording
            and layer.training
            and torch.is_grad_enabled()
            and not _in_backward()
        ):
            _record(self._watched, layer, args[0] if args else kwargs["input"])


class _Idle:
    """A hook that does nothing."""

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        return None


@torch.no_grad()
def _record(watched: _Watched, layer: nn.Module, inputs: Tensor) -> None:
    with torch.autocast(inputs.device.type, enabled=False):
        x = inputs.detach()
        x = x if x.dtype == torch.float64 else x.float()
        x = unfold(layer, x) if isinstance(layer, nn.Conv2d) else x.reshape(-1, x.shape[-1])
        gram = x.T @ x
        if watched.has_bias:  # as if x had a one appended, without copying it
            gram = F.pad(gram, (0, 1, 0, 1))
            gram[-1, :-1] = gram[:-1, -1] = x.sum(dim=0)
            gram[-1, -1] = len(x)
        watched.total = gram if watched.total is None else watched.total + gram
        watched.count += len(x)


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
    """Parameters that go by more than one name, since modules share them or are shared themselves."""
    names = Counter(p for _, p in model.named_parameters(remove_duplicate=False))
    return {p for p, count in names.items() if count > 1}


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread, as when a checkpoint recomputes."""
    return torch._C._current_graph_task_id() != -1
