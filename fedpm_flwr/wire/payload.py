"""All of a client's curvature as one safetensors document (docs/wire-format.md).

The bytes may come from a broken or hostile client: everything is checked before it is believed.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from ..curvature import Block, Dense, KroneckerRight, LayerCurvature
from .codecs import CODECS, get_codec

FORMAT_VERSION = 1
METADATA_KEY = "fedpm"
_HEADER_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 4 << 20
_MAX_QUOTE = 100
"""Longest part of a stranger's bytes that an error message repeats."""
_METADATA = "__metadata__"
_DTYPES = {torch.float32: "F32", torch.float64: "F64"}
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
        ValueError: the codec is unknown, a kind of curvature does not travel, or a damping is not
            a finite number >= 0.
    """
    packer = get_codec(codec)
    table: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for index, layer in enumerate(layers):
        matrix = _matrix(layer)
        if not (math.isfinite(layer.damping) and layer.damping >= 0):
            raise ValueError(f"layer {layer.block.name!r}: damping {layer.damping} is not a finite number >= 0")
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
        tensors |= {f"{index}.{key}": tensor for key, tensor in packer.pack(matrix).items()}
    metadata = {METADATA_KEY: json.dumps({"version": FORMAT_VERSION, "layers": table}, separators=(",", ":"))}
    return save(tensors, metadata)


def decode(
    data: bytes, shapes: Mapping[str, Sequence[int]], max_bytes: int = 1 << 30, max_side: int = 1 << 15
) -> list[LayerCurvature]:
    """Bytes as curvatures, each checked against the model it belongs to.

    Args:
        data: what ``encode`` made.
        shapes: the shape of every parameter of the model, by name.
        max_bytes: payloads longer than this are refused unread.
        max_side: matrices larger than this are refused unread.

    Raises:
        PayloadError: naming the layer and what is wrong with it. Whether the matrix is positive
            definite is not checked here.
    """
    if len(data) > max_bytes:
        raise PayloadError(f"the payload has {len(data)} bytes, more than the {max_bytes} allowed")
    header = _read_header(data)
    entries = _read_entries(header.pop(_METADATA))
    seen: set[str] = set()
    expected: dict[str, tuple[str, list[int]]] = {}
    for index, entry in enumerate(entries):
        _check_entry(entry, shapes, seen)
        if entry["side"] > max_side:
            raise PayloadError(f"{_where(entry)}: side {entry['side']}, more than the {max_side} allowed")
        layout = get_codec(entry["codec"]).layout(entry["side"])
        expected |= {f"{index}.{key}": (_DTYPES[dtype], list(shape)) for key, (dtype, shape) in layout.items()}
    _check_tensors(header, expected)
    try:
        tensors = load(data)
        return [_read_layer(index, entry, tensors) for index, entry in enumerate(entries)]
    except PayloadError:
        raise
    except Exception as error:  # bytes from outside: whatever else is wrong with them, they are no payload
        raise PayloadError(f"not a safetensors document: {error!r:.{_MAX_QUOTE}}") from error


def _matrix(layer: LayerCurvature) -> Tensor:
    match layer.curvature:
        case KroneckerRight(factor=matrix) | Dense(matrix=matrix):
            return matrix
    raise ValueError(f"layer {layer.block.name!r}: curvature of kind {layer.curvature.kind!r} does not travel")


def _read_header(data: bytes) -> dict[str, Any]:
    """The document's header: its metadata, and dtype, shape and place of each tensor."""
    length = int.from_bytes(data[:_HEADER_LENGTH_BYTES], "little")
    if length > min(_MAX_HEADER_BYTES, len(data) - _HEADER_LENGTH_BYTES):
        raise PayloadError(f"a header of {length} bytes in a payload of {len(data)}")
    try:
        header = json.loads(data[_HEADER_LENGTH_BYTES : _HEADER_LENGTH_BYTES + length])
    except (ValueError, RecursionError) as error:
        raise PayloadError(f"its header is not JSON: {error!r:.{_MAX_QUOTE}}") from error
    if not isinstance(header, dict) or _METADATA not in header:
        raise PayloadError("its header has no metadata")
    return header


def _read_entries(metadata: Any) -> list[Any]:
    """The table of layers in the metadata, of which only the version is checked."""
    try:
        document = json.loads(metadata[METADATA_KEY])
        version, entries = document["version"], document.get("layers")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PayloadError(f"no {METADATA_KEY!r} metadata: {error!r:.{_MAX_QUOTE}}") from error
    if type(version) is not int or version != FORMAT_VERSION:
        raise PayloadError(f"format version {version!r:.{_MAX_QUOTE}}; this library reads {FORMAT_VERSION}")
    if not isinstance(entries, list):
        raise PayloadError("the metadata holds no list of layers")
    return entries


def _check_entry(entry: Any, shapes: Mapping[str, Sequence[int]], seen: set[str]) -> None:
    """The table's entry of one layer has all that it needs, and fits the model."""
    if not isinstance(entry, dict) or any(type(entry.get(key)) not in types for key, types in _FIELDS.items()):
        raise PayloadError(
            f"a layer's entry must have {', '.join(_FIELDS)}, each of its type; got {entry!r:.{_MAX_QUOTE}}"
        )
    where = _where(entry)
    for key, allowed in (("kind", _KINDS), ("codec", CODECS)):
        if entry[key] not in allowed:
            raise PayloadError(
                f"{where}: unknown {key} {entry[key]!r:.{_MAX_QUOTE}}; allowed: {', '.join(allowed)}"
            )
    damping = _to_float(entry["damping"])
    if not (math.isfinite(damping) and damping >= 0):
        raise PayloadError(f"{where}: damping {damping} is not a finite number >= 0")
    _check_parameters(where, entry, shapes, seen)


def _check_parameters(
    where: str, entry: dict[str, Any], shapes: Mapping[str, Sequence[int]], seen: set[str]
) -> None:
    """The parameters exist, belong to one layer only, and form a matrix of the curvature's side."""
    keys = entry["parameters"]
    if not keys:
        raise PayloadError(f"{where}: no parameters")
    for key in keys:
        if not isinstance(key, str) or key not in shapes:
            raise PayloadError(f"{where}: unknown parameter {key!r:.{_MAX_QUOTE}}")
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


def _check_tensors(header: dict[str, Any], expected: dict[str, tuple[str, list[int]]]) -> None:
    """The document holds the tensors that the table needs, no other, before any is read."""
    for name in header:
        if name not in expected:
            raise PayloadError(f"tensor of no layer: {name!r:.{_MAX_QUOTE}}")
    for name, (dtype, shape) in expected.items():
        found = header.get(name)
        if not isinstance(found, dict) or (found.get("dtype"), found.get("shape")) != (dtype, shape):
            raise PayloadError(f"tensor {name!r} must be {dtype} {shape}; got {found!r:.{_MAX_QUOTE}}")


def _read_layer(index: int, entry: dict[str, Any], tensors: dict[str, Tensor]) -> LayerCurvature:
    codec = get_codec(entry["codec"])
    matrix = codec.unpack({key: tensors[f"{index}.{key}"] for key in codec.layout(entry["side"])}, entry["side"])
    if not torch.isfinite(matrix).all():
        raise PayloadError(f"{_where(entry)}: the curvature is not finite")
    if (matrix.diagonal() < 0).any():
        raise PayloadError(f"{_where(entry)}: the curvature has a negative number on its diagonal")
    block = Block(entry["name"], tuple(entry["parameters"]))
    return LayerCurvature(block, _KINDS[entry["kind"]](matrix), _to_float(entry["damping"]))


def _where(entry: dict[str, Any]) -> str:
    return f"layer {entry['name']!r:.{_MAX_QUOTE}}"


def _to_float(number: float) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf
