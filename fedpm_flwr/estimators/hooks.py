"""Hooks that measure. They hold nothing alive, and copies of the model do not have them."""

import weakref
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class Hook:
    """Calls ``owner``'s method by name with ``extra`` and what the hook gets, as long as the owner lives.

    Only in forwards in training mode with gradients enabled: not under ``no_grad``, not in
    evaluation mode, not while a checkpoint recomputes during the backward pass. In the
    replicas that DataParallel makes for several devices it raises ValueError instead.
    """

    def __init__(self, owner: object, method: str, *extra: Any) -> None:
        self._owner = weakref.ref(owner)
        self._method = method
        self._extra = extra
        # A compiled model runs it as it is. Not as a decorator: that takes seconds to import.
        self._run = torch.compiler.disable(self._measure)

    def __reduce__(self) -> tuple[type["Idle"], tuple[()]]:
        return Idle, ()  # what a copied or saved model gets instead

    def __call__(self, layer: nn.Module, *seen: Any) -> None:
        self._run(layer, *seen)

    def _measure(self, layer: nn.Module, *seen: Any) -> None:
        owner = self._owner()
        if owner is not None and layer.training and torch.is_grad_enabled() and not in_backward():
            if getattr(layer, "_is_replica", False):  # made later than the optimizer, which could not refuse it
                raise several_devices(type(owner).__name__)
            getattr(owner, self._method)(*self._extra, layer, *seen)


def several_devices(who: str) -> ValueError:
    """What is raised where a batch is spread over several devices."""
    return ValueError(
        f"{who} measures curvature on one device, in one process, not where DataParallel or "
        "torch.distributed has spread a batch over several: each would step by another P"
    )


class Idle:
    """A hook that does nothing."""

    def __call__(self, layer: nn.Module, *seen: Any) -> None:
        return None


class Handles:
    """Hooks that are taken off the model with their owner, or before."""

    def __init__(self, owner: object) -> None:
        self._handles: list[RemovableHandle] = []
        self._finalizer = weakref.finalize(owner, _remove, self._handles)

    def add(self, handle: RemovableHandle) -> None:
        self._handles.append(handle)

    def remove(self) -> None:
        self._finalizer()


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of a ``torch.compile``d one, under whose names its parameters are sent."""
    inner: nn.Module = getattr(model, "_orig_mod", model)
    return inner


def in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread, as when a checkpoint recomputes."""
    return torch._C._current_graph_task_id() != -1


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
