"""Curvature under the names of the arrays that are exchanged: of a part of the model, or of a wrapped one."""

import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from ..curvature import Block, LayerCurvature

_COMPILED, _WRAPPED = "_orig_mod.", "module."
"""What ``torch.compile`` puts before the names of what it compiles, and ``DataParallel`` before all names."""
_ADAPTER = re.compile(r"(?<=\.)(?:(lora_[AB])\.default|modules_to_save\.default)\.")
"""The default adapter in PEFT's names, as ``get_peft_model_state_dict`` leaves it out of the names it returns."""
_ALSO_LEFT_OUT = re.compile(r"(?<=\.lora_magnitude_vector)\.default\.weight$|(?<=.)\.default(?=\.|$)")
"""What else PEFT leaves out of names, of adapters that no curvature is looked for under such a name."""
_MOST_NAMED = 3
_CALLS_FROM_REPLY = 3
"""From here by way of ``curvature_record`` to who calls that."""


def in_names(
    layers: Iterable[LayerCurvature], names: Collection[str], own: Collection[str] = ()
) -> list[LayerCurvature]:
    """The layers with these names for their parameters: the same but for what wrappers, and PEFT, put in them.

    ``own``: all names of the model whose layers they are, among which these prefixes may tell two apart.

    A layer none of whose parameters is among them is left out, with a warning that names it. Of tied
    parameters one name is enough.

    Raises:
        ValueError: only some parameters of a layer are among them; or there are layers, and none of them is.
    """
    bare = {_bare(name): name for name in names}
    if not (_tells_apart(_bare, names) and _tells_apart(_bare, own)):
        bare = {}  # two of them differ by a prefix alone: then no prefix is passed over

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


def check_names(sent: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse where a name need not mean the same array to the server and in the optimizer's model, ``own``.

    One of the two may be a module inside the other: its ``fc.weight`` is then the other's ``part.fc.weight``,
    which may have a ``fc.weight`` of its own.

    Raises:
        ValueError: the model lacks an array of the server's, as a submodule does; or the server's arrays
            are, by names and shapes, those of a part of the model as well.
    """
    is_plain = _tells_apart(_saved, sent) and _tells_apart(_saved, own)
    theirs, ours = (
        {_saved(name) if is_plain else name: value.shape for name, value in arrays.items()}
        for arrays in (sent, own)
    )
    odd = [name for name, shape in theirs.items() if ours.get(name) != shape]
    if odd:
        raise ValueError(
            f"the server has sent {_few(odd)}, which the optimizer's model does not have in this shape: if it was "
            "given a part of the model, its names are other layers' there; give it the model whose arrays are "
            "exchanged, and the parameters to train"
        )
    first = next(iter(theirs))
    for prefix in [name.removesuffix(first) for name in ours if name.endswith(f".{first}")]:
        if all(ours.get(prefix + name) == shape for name, shape in theirs.items()):
            raise ValueError(
                f"the arrays that the server has sent, {_few(theirs)}, may be the model's or those of its part "
                f"{prefix.rstrip('.')!r}: exchange more of the model, or rename a module, so that they differ"
            )


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


def _saved(name: str) -> str:
    return _ALSO_LEFT_OUT.sub("", _bare(name))


def _tells_apart(spell: Callable[[str], str], names: Collection[str]) -> bool:
    return len({spell(name) for name in names}) == len(names)


def _few(names: Iterable[str]) -> str:
    every = [repr(name) for name in names]
    more = f" and {len(every) - _MOST_NAMED} more" if len(every) > _MOST_NAMED else ""
    return ", ".join(every[:_MOST_NAMED]) + more
