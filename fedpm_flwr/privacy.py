"""Flower's differential privacy covers parameters alone: who sends anything beside them must not be under it."""

import multiprocessing
import re
import sys
import warnings
from collections.abc import Iterator
from types import FrameType

_MODULES = re.compile(r"flwr\.(server|client)app\..*(dp_\w+|localdp_mod|centraldp_mods)$")
"""Where Flower has its strategies that wrap others, and its mods of ClientApps."""
_APPS = ("flwr.clientapp.client_app", "flwr.serverapp.server_app")
"""Where Flower calls what users write: all that is around that is called from there."""
_CALLS_FROM_RECORD = 3
"""From here by way of ``curvature_record`` to who calls that."""


def refuse_differential_privacy() -> None:
    """To be called where curvature, or what else is made of the data, is asked for or sent.

    Neither a strategy nor a ClientApp is told what is around it, so this looks who has called it, and what
    the other threads of the process are in, one of which may have started this one. In another process that
    an app has started there may be nothing to see: then a warning says so.

    Raises:
        ValueError: one of Flower's wrappers or mods for differential privacy, or a class derived from it.
    """
    frames = [frame for top in sys._current_frames().values() for frame in _callers(top)]
    for frame in frames:
        caller = type(frame.f_locals.get("self"))
        places = {str(base.__module__): caller.__name__ for base in caller.__mro__}
        places[_module(frame)] = frame.f_code.co_qualname.split(".")[0]
        for module, name in places.items():
            if _MODULES.match(module):
                raise ValueError(
                    f"{name} protects parameters, not curvature: take a strategy without curvature, "
                    "such as Guarded (algorithm localnewton), or no differential privacy"
                )
    if multiprocessing.parent_process() is not None and not any(_module(frame) in _APPS for frame in frames):
        warnings.warn(
            "in a process of its own it cannot be seen whether the ClientApp has mods for differential privacy, "
            "which would not protect curvature: make the reply in the ClientApp's process, or have no such mods",
            stacklevel=_CALLS_FROM_RECORD,
        )


def _callers(top: FrameType) -> Iterator[FrameType]:
    frame: FrameType | None = top
    while frame is not None:
        yield frame
        frame = frame.f_back


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__"))
