"""All of a client's curvature as one safetensors document (docs/wire-format.md).

The bytes may come from a broken or hostile client: everything is checked before it is believed.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..curvature import Block, Dense, KroneckerRight, LayerCurvature
from .codecs import CODECS, get_codec

FORMAT_VERSION = 1
METADATA_KEY = "fedpm"
_HEADER_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 4 << 20
_KINDS: dict[str, Any] = {KroneckerRight.kind: KroneckerRight, Dense.kind: Dense}
_FIELDS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "parameters": (list,),
    "kind": (str,),
    "codec": (str,),
    "side": (int,),
    "damping": (float, int),
}


class PayloadError(ValueError):
    """The bytes are not a payload that this version can read."""


def encode(layers: Iterable[LayerCurvature], codec: str) -> bytes:
    """Curvatures as bytes; equal input gives equal bytes.

    Raises:
        ValueError: the codec is unknown, or a kind of curvature does not travel.
    """
    table: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for index, layer in enumerate(layers):
        matrix = _matrix(layer)
        table.append(
            {
                "name": layer.block.name,
                "parameters": list(layer.block.parameters),
                "kind": layer.curvature.kind,
                "codec": codec,
                "side": len(matrix),
                "damping": float(layer.damping),
            }
        )
        packed = get_codec(codec).pack(matrix)
        tensors |= {f"{index}.{key}": tensor.contiguous() for key, tensor in packed.items()}
    metadata = {METADATA_KEY: json.dumps({"version": FORMAT_VERSION, "layers": table}, separators=(",", ":"))}
    return save(tensors, metadata)


def decode(data: bytes, shapes: Mapping[str, Sequence[int]], max_bytes: int = 1 << 30) -> list[LayerCurvature]:
    """Bytes as curvatures, each checked against the model it belongs to.

    Args:
        data: what ``encode`` made.
        shapes: the shape of every parameter of the model, by name.
        max_bytes: payloads longer than this are refused unread.

    Raises:
        PayloadError: naming the layer and what is wrong with it. Whether the matrix is positive
            definite is not checked here.
    """
    if len(data) > max_bytes:
        raise PayloadError(f"the payload has {len(data)} bytes, more than the {max_bytes} allowed")
    table = _read_table(data)
    try:
        tensors = load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise PayloadError(f"not a safetensors document: {error}") from error
    layers = []
    seen: set[str] = set()
    for index, entry in enumerate(table):
        own = {key.split(".", 1)[1]: tensors.pop(key) for key in list(tensors) if key.startswith(f"{index}.")}
        layers.append(_read_layer(entry, own, shapes, seen))
    if tensors:
        raise PayloadError(f"tensors of no layer: {', '.join(sorted(tensors))}")
    return layers


def _matrix(layer: LayerCurvature) -> Tensor:
    match layer.curvature:
        case KroneckerRight(factor=matrix) | Dense(matrix=matrix):
            return matrix
    raise ValueError(f"layer {layer.block.name!r}: curvature of kind {layer.curvature.kind!r} does not travel")


def _read_table(data: bytes) -> list[Any]:
    """The table of layers in the document's metadata, of which only the version is checked."""
    length = int.from_bytes(data[:_HEADER_LENGTH_BYTES], "little")
    if length > min(_MAX_HEADER_BYTES, len(data) - _HEADER_LENGTH_BYTES):
        raise PayloadError(f"a header of {length} bytes in a payload of {len(data)}")
    try:
        header = json.loads(data[_HEADER_LENGTH_BYTES : _HEADER_LENGTH_BYTES + length])
        document = json.loads(header["__metadata__"][METADATA_KEY])
        version, table = document["version"], document.get("layers")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PayloadError(f"no {METADATA_KEY!r} metadata: {error!r}") from error
    if version != FORMAT_VERSION:
        raise PayloadError(f"format version {version!r}; this library reads {FORMAT_VERSION}")
    if not isinstance(table, list):
        raise PayloadError("the metadata holds no list of layers")
    return table


def _read_layer(
    entry: Any, tensors: dict[str, Tensor], shapes: Mapping[str, Sequence[int]], seen: set[str]
) -> LayerCurvature:
    if not isinstance(entry, dict) or any(type(entry.get(key)) not in types for key, types in _FIELDS.items()):
        raise PayloadError(f"a layer's entry must have {', '.join(_FIELDS)}, each of its type; got {entry!r:.200}")
    where = f"layer {entry['name']!r:.100}"
    if entry["kind"] not in _KINDS:
        raise PayloadError(f"{where}: unknown kind {entry['kind']!r:.50}; allowed: {', '.join(_KINDS)}")
    if entry["codec"] not in CODECS:
        raise PayloadError(f"{where}: unknown codec {entry['codec']!r:.50}; allowed: {', '.join(CODECS)}")
    damping = _to_float(entry["damping"])
    if not (math.isfinite(damping) and damping >= 0):
        raise PayloadError(f"{where}: damping {damping} is not a finite number >= 0")
    _check_parameters(where, entry, shapes, seen)
    try:
        matrix = get_codec(entry["codec"]).unpack(tensors, entry["side"])
    except ValueError as error:
        raise PayloadError(f"{where}: {error}") from error
    if not torch.isfinite(matrix).all():
        raise PayloadError(f"{where}: the curvature is not finite")
    if (matrix.diagonal() < 0).any():
        raise PayloadError(f"{where}: the curvature has a negative number on its diagonal")
    block = Block(entry["name"], tuple(entry["parameters"]))
    return LayerCurvature(block, _KINDS[entry["kind"]](matrix), damping)


def _to_float(number: float | int) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf


def _check_parameters(
    where: str, entry: dict[str, Any], shapes: Mapping[str, Sequence[int]], seen: set[str]
) -> None:
    """The parameters exist, belong to one layer only, and form a matrix of the curvature's side."""
    keys = entry["parameters"]
    if not keys:
        raise PayloadError(f"{where}: no parameters")
    for key in keys:
        if not isinstance(key, str) or key not in shapes:
            raise PayloadError(f"{where}: unknown parameter {key!r:.100}")
        if key in seen:
            raise PayloadError(f"{where}: parameter {key!r} has a curvature already")
        seen.add(key)
    rows = {shapes[key][0] if len(shapes[key]) else 1 for key in keys}
    if len(rows) != 1:
        raise PayloadError(f"{where}: parameters with different first dimensions {sorted(rows)}")
    size = sum(math.prod(shapes[key]) for key in keys)
    side = size if entry["kind"] == Dense.kind else size // max(rows.pop(), 1)
    if entry["side"] != side:
        raise PayloadError(f"{where}: side {entry['side']}, but its parameters need {side}")
