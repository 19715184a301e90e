"""Blocks for curvature that does not go by layers: each parameter for itself, or the whole model."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

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


def derivatives(
    functions: Tensor, parameters: Sequence[nn.Parameter], directions: Tensor | None = None, **options: Any
) -> list[Tensor | None]:
    """``torch.autograd.grad``; None for parameters that are frozen by now, or that no function depends on."""
    open_ones = [p for p in parameters if p.requires_grad]
    if not open_ones:
        return [None] * len(parameters)
    found = iter(torch.autograd.grad(functions, open_ones, directions, allow_unused=True, **options))
    return [next(found) if p.requires_grad else None for p in parameters]
