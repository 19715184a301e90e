"""Flower's differential privacy covers parameters alone: who sends anything beside them must not be under it."""

import inspect
import re

_MODULES = re.compile(r"flwr\.(server|client)app\..*(dp_\w+|localdp_mod|centraldp_mods)$")
"""Where Flower has its strategies that wrap others, and its mods of ClientApps."""


def refuse_differential_privacy() -> None:
    """To be called where curvature, or what else is made of the data, is asked for or sent.

    Neither a strategy nor a ClientApp is told what is around it, so this looks who has called it.

    Raises:
        ValueError: one of Flower's wrappers or mods for differential privacy, or a class derived from it.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = type(frame.f_locals.get("self"))
        places = {str(base.__module__): caller.__name__ for base in caller.__mro__}
        places[str(frame.f_globals.get("__name__"))] = frame.f_code.co_qualname.split(".")[0]
        for module, name in places.items():
            if _MODULES.match(module):
                raise ValueError(
                    f"{name} protects parameters, not curvature: take a strategy without curvature, "
                    "such as Guarded (algorithm localnewton), or no differential privacy"
                )
        frame = frame.f_back
