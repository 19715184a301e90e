"""Local steps by a corrected gradient, g ← g + a, under any optimizer: for control variates, proximal terms."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def correct_gradients(
    optimizer: torch.optim.Optimizer, addition: Callable[[nn.Parameter], Tensor | None]
) -> RemovableHandle:
    """From now on, add ``addition(p)`` to each parameter's gradient before the optimizer steps; None: nothing.

    The gradient is there when ``step`` is called: a closure given to ``step`` comes too late.
    """

    @torch.no_grad()
    def before_step(stepping: torch.optim.Optimizer, arguments: Any, keywords: Any) -> None:
        for group in stepping.param_groups:
            for p in group["params"]:
                added = addition(p) if p.grad is not None else None
                if added is not None:
                    p.grad.add_(added)

    return optimizer.register_step_pre_hook(before_step)
