"""Curvature under the names of the arrays that are exchanged: of a part of the model, or of a wrapped one."""

import re
import warnings
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace

from ..curvature import Block, LayerCurvature

_COMPILED, _WRAPPED = "_orig_mod.", "module."
"""What ``torch.compile`` puts before the names of what it compiles, and ``DataParallel`` before all names."""
_ADAPTER = re.compile(r"(?<=\.)(?:(lora_[AB])\.default|modules_to_save\.default)\.")
"""The default adapter in PEFT's names, as ``get_peft_model_state_dict`` leaves it out of the names it returns."""
_MOST_NAMED = 3
_CALLS_FROM_REPLY = 3
"""From here by way of ``curvature_record`` to who calls that."""


def in_names(layers: Iterable[LayerCurvature], names: Collection[str]) -> list[LayerCurvature]:
    """The layers with these names for their parameters: the same but for what wrappers, and PEFT, put in them.

    A layer none of whose parameters is among them is left out, with a warning that names it. Of tied
    parameters one name is enough.

    Raises:
        ValueError: only some parameters of a layer are among them; or there are layers, and none of them is.
    """
    bare = {_bare(name): name for name in names}
    if len(bare) < len(names):  # two of them differ by a prefix alone: then no prefix is passed over
        bare = {}

    def find(key: str) -> str | None:
        return key if key in names else bare.get(_bare(key))

    given = list(layers)
    renamed = [_renamed(layer, find) for layer in given]
    kept = [layer for layer in renamed if layer is not None]
    if given and not kept:
        raise ValueError(
            f"none of the optimizer's layers is among the arrays that the server has sent: it has curvature of "
            f"{_few(key for layer in given for key in layer.block.parameters)}; the arrays are {_few(names)}"
        )
    if len(kept) < len(given):
        left = [
            key for old, new in zip(given, renamed, strict=True) if new is None for key in old.block.parameters
        ]
        warnings.warn(
            f"no curvature is sent of {_few(left)}, which are not among the arrays that the server has sent",
            stacklevel=_CALLS_FROM_REPLY,
        )
    return kept


def _renamed(layer: LayerCurvature, find: Callable[[str], str | None]) -> LayerCurvature | None:
    block, parameters, copies, missing = layer.block, list[str](), list[tuple[str, str]](), list[str]()
    for key in block.parameters:
        tied = [key, *(alias for alias, original in block.copies if original == key)]
        first, *others = [name for name in map(find, tied) if name is not None] or [""]
        if first:
            parameters.append(first)
            copies += [(other, first) for other in others]
        else:
            missing.append(key)
    if parameters and missing:
        raise ValueError(
            f"layer {block.name!r}: the server has sent only some of its parameters, not {_few(missing)}: "
            "give the optimizer those alone that are exchanged, or exchange them all"
        )
    if not parameters:
        return None
    return replace(layer, block=Block(block.name, tuple(parameters), tuple(sorted(copies))))


def _bare(name: str) -> str:
    name = name.replace(_COMPILED, "")
    while name.startswith(_WRAPPED):
        name = name.removeprefix(_WRAPPED)
    return _ADAPTER.sub(lambda found: f"{found[1]}." if found[1] else "", name)


def _few(names: Iterable[str]) -> str:
    every = [repr(name) for name in names]
    more = f" and {len(every) - _MOST_NAMED} more" if len(every) > _MOST_NAMED else ""
    return ", ".join(every[:_MOST_NAMED]) + more
