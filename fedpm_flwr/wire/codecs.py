"""How a part of a curvature becomes named tensors: the codecs by name. A new one is one line here."""

import re

import torch

from .layout import PartCodec
from .low_rank import Spectral
from .positions import Positions
from .rounded_factor import RoundedFactor
from .triangle import Triangle
from .values import Constant, Int8Columns, Values

_MATRICES: dict[str, PartCodec] = {
    "triangle-float64": Triangle(torch.float64),
    "triangle-float32": Triangle(torch.float32),
    "factor-bfloat16": RoundedFactor(torch.bfloat16),
    "factor-int8": RoundedFactor(torch.int8),
}
_OTHERS: dict[str, PartCodec] = {
    "values-float64": Values(torch.float64),
    "values-float32": Values(torch.float32),
    "values-bfloat16": Values(torch.bfloat16),
    "columns-int8": Int8Columns(),
    "constant": Constant(),
}
_NUMBERED: dict[str, type[Spectral] | type[Positions]] = {"spectral": Spectral, "positions": Positions}
_NUMBER = re.compile(r"(\w+)-(0|[1-9]\d{0,6})")


def codec_of_part(name: str, symmetric: bool) -> PartCodec:
    """The codec of this name, for parts that are symmetric matrices [.., n, n] or for the others.

    Raises:
        ValueError: naming those there are.
    """
    known = _MATRICES if symmetric else _OTHERS
    if name in known:
        return known[name]
    numbered = _NUMBER.fullmatch(name) if symmetric else None
    if numbered and numbered[1] in _NUMBERED and (numbered[1] == "spectral" or numbered[2] != "0"):
        return _NUMBERED[numbered[1]](int(numbered[2]))
    allowed = [*known, *(f"{key}-NUMBER" for key in (_NUMBERED if symmetric else ()))]
    raise ValueError(f"unknown codec {name!r:.100}; allowed: {', '.join(allowed)}")
