"""What a layer's input x is, for each type of layer; and which parameters of it make a block."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ..curvature import Block

CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NAMES: dict[type[nn.Module], tuple[str, str]] = {
    nn.Linear: ("weight", "bias"),
    nn.Embedding: ("weight", ""),
    nn.MultiheadAttention: ("in_proj_weight", "in_proj_bias"),
    **dict.fromkeys(CONVOLUTIONS, ("weight", "bias")),
}
"""The types of layers with curvature, and their parameters; exact types, since others may do as they like."""


@dataclass(frozen=True)
class Layer:
    """One block of parameters and the modules that use them: several if they are tied."""

    block: Block
    modules: tuple[nn.Module, ...]
    has_bias: bool


def find_layers(
    model: nn.Module,
    chosen: set[nn.Parameter],
    max_side: int,
    only: Collection[type[nn.Module]] | None = None,
    max_outputs: int | None = None,
) -> tuple[list[Layer], list[str]]:
    """The layers whose chosen parameters can have curvature, and of the others ``name (reason)``.

    Of the types ``only``, where that is given; ``max_side`` is for inputs.
    """
    types = _NAMES if only is None else only
    names: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, p in model.named_parameters(remove_duplicate=False):
        names[p].append(name)
    users: dict[nn.Parameter, list[nn.Module]] = defaultdict(list)
    for module in model.modules():
        for p in module.parameters(recurse=False):
            users[p].append(module)
    layers: list[Layer] = []
    left_out: list[str] = []
    found: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        own = {key: p for key, p in module.named_parameters(recurse=False) if p in chosen and p not in found}
        covered: dict[str, nn.Parameter] = {}
        reason = _why_not(module, own, users, types, max_side, max_outputs)
        if not reason:
            weight, bias = _NAMES[type(module)]
            covered = {key: own[key] for key in (weight, bias) if key in own}
            parameters = tuple(names[p][0] for p in covered.values())
            copies = tuple(sorted((alias, names[p][0]) for p in covered.values() for alias in names[p][1:]))
            modules = tuple(users[own[weight]])
            layers.append(Layer(Block(name, parameters, copies), modules, bias in own))
            found |= set(covered.values())
        rest = ", ".join(key for key in own if key not in covered)
        if rest:
            left_out.append(f"{name or type(module).__name__} ({reason or rest})")
    return layers, left_out


def _why_not(
    module: nn.Module,
    own: dict[str, nn.Parameter],
    users: Mapping[nn.Parameter, list[nn.Module]],
    types: Collection[type[nn.Module]],
    max_side: int,
    max_outputs: int | None,
) -> str:
    """Why a module with these trainable parameters gets no curvature; empty if it does, or needs none."""
    if not own or type(module) not in types:
        return type(module).__name__
    weight, bias = _NAMES[type(module)]
    if weight not in own:
        return "frozen weight" if weight in dict(module.named_parameters(recurse=False)) else type(module).__name__
    if not own[weight].numel():
        return "no inputs or no outputs"
    twins = users[own[weight]]
    alike = all(
        type(twin) is type(module)
        and getattr(twin, bias, None) is getattr(module, bias, None)
        and getattr(twin, "groups", 1) == getattr(module, "groups", 1)
        for twin in twins
    )
    if not alike or (bias in own and len(users[own[bias]]) != len(twins)):
        return "shared parameter"
    if isinstance(module, nn.Embedding):
        return "sparse gradient" if module.sparse else ""
    side, outputs = own[weight][0].numel() + (bias in own), len(own[weight]) // getattr(module, "groups", 1)
    if side > max_side:
        return f"{side} inputs, more than {max_side}"
    if max_outputs is not None and outputs > max_outputs:
        return f"{outputs} outputs, more than {max_outputs}"
    return ""


def inputs_of(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Iterator[Tensor]:
    """The tensors that a covered layer takes: one; of attention, query, key and value."""
    names = ("query", "key", "value") if isinstance(layer, nn.MultiheadAttention) else ("input",)
    for place, name in enumerate(names):
        yield args[place] if place < len(args) else kwargs[name]


def rows_of(layer: nn.Module, x: Tensor, stride: int = 1, offset: int = 0) -> Tensor:
    """The x that a layer sees, one a row: [examples · positions, n], or [groups, …, n] of a grouped convolution.

    With a ``stride`` only every so-many-th position counts, from the ``offset``-th: of a convolution
    in each direction, of attention along the sequence, else along the dimension before the last.
    """
    if isinstance(layer, CONVOLUTIONS):
        return patches(layer, x, stride, offset)
    if isinstance(layer, nn.MultiheadAttention):
        x = _every(x, 1 if layer.batch_first and x.ndim == 3 else 0, stride, offset)
    elif x.ndim > 2:
        x = _every(x, x.ndim - 2, stride, offset)
    return x.reshape(-1, x.shape[-1])


def _every(x: Tensor, dimension: int, stride: int, offset: int) -> Tensor:
    """Every ``stride``-th entry along a dimension, from the ``offset``-th on, of which there is at least one."""
    if stride == 1:
        return x
    start = offset % min(stride, x.shape[dimension])
    return x[(slice(None),) * dimension + (slice(start, None, stride),)]


def patches(layer: nn.Module, images: Tensor, stride: int = 1, offset: int = 0) -> Tensor:
    """The patches that a convolution sees, [batch · positions, channels · kernel], or [groups, …] of them.

    Columns are in the order of ``layer.weight.flatten(1)``. Images are [batch, channels, …] or
    [channels, …], with one, two or three further dimensions.
    """
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    dimensions = len(layer.kernel_size)
    images = images if images.ndim == dimensions + 2 else images.unsqueeze(0)
    # The paddings of the last dimension first, both sides, with padding="same" worked out.
    padding = layer._reversed_padding_repeated_twice
    if any(padding):
        images = F.pad(images, padding, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    view = images
    for i, (size, step, gap) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        view = view.unfold(2 + i, gap * (size - 1) + 1, step)[..., ::gap]
        view = _every(view, 2 + i, stride, offset)
    # [batch, channels, positions …, kernel …] -> [channels, kernel …, batch, positions …]: copied in longer
    # runs than patch by patch, and so twice as fast.
    kernel, positions = range(2 + dimensions, 2 + 2 * dimensions), range(2, 2 + dimensions)
    columns = view.permute(1, *kernel, 0, *positions).reshape(layer.groups, layer.weight[0].numel(), -1)
    return columns.mT if layer.groups > 1 else columns[0].mT
