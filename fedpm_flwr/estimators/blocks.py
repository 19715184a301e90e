"""Blocks for curvature that does not go by layers: each parameter for itself, or the whole model."""

from collections import defaultdict
from collections.abc import Iterable

from torch import nn

from ..curvature import Block
from .hooks import unwrapped


def named_trainable(model: nn.Module, parameters: Iterable[nn.Parameter] | None) -> dict[nn.Parameter, list[str]]:
    """Those of the given parameters (by default all of the model's) that are not frozen, and their names."""
    chosen = None if parameters is None else set(parameters)
    names: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, p in unwrapped(model).named_parameters(remove_duplicate=False):
        if p.requires_grad and p.numel() and (chosen is None or p in chosen):
            names[p].append(name)
    return names


def parameter_blocks(model: nn.Module, parameters: Iterable[nn.Parameter] | None) -> dict[Block, nn.Parameter]:
    """A block for each trainable parameter."""
    return {
        Block(first, (first,), tuple(sorted((alias, first) for alias in others))): p
        for p, (first, *others) in named_trainable(model, parameters).items()
    }


def model_block(model: nn.Module, parameters: Iterable[nn.Parameter] | None) -> tuple[Block, list[nn.Parameter]]:
    """One block of all trainable parameters."""
    names = named_trainable(model, parameters)
    copies = tuple(sorted((alias, first) for first, *others in names.values() for alias in others))
    return Block("model", tuple(first for first, *_ in names.values()), copies), list(names)
