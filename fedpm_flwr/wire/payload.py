"""All of a client's curvature as one safetensors document (docs/wire-format.md).

The bytes may come from a broken or hostile client: everything is checked before it is believed.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from ..config import check_codec
from ..curvature import KINDS, Block, Curvature, CurvatureError, Identity, LayerCurvature, matrix_shape
from .budget import spend
from .compression import compress
from .layout import prefixed, without_prefix
from .packed import Packed, entry_of, layout, named

FORMAT_VERSION = 1
"""Of the bytes: another one is refused."""
METADATA_KEY = "fedpm"
DEFAULT_SHARE = 0.05
"""Of the parameters' bytes, what ``codec="auto"`` may spend."""
_HEADER_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 4 << 20
_DECODED_BYTES, _DECODED_SHARE = 4, 4
"""Of a number, as it arrives; of all of them, how many times the bytes that a payload may have."""
_MAX_QUOTE = 100
"""Longest part of a stranger's bytes that an error message repeats."""
_METADATA = "__metadata__"
_DTYPES = {torch.int8: "I8", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}
_FRAME = 80
"""Bytes of a payload without layers, at most: its length, its metadata and what fills it up to a multiple of 8."""
_FIELDS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "parameters": (list,),
    "copies": (dict,),
    "kind": (str,),
    "codecs": (dict,),
    "shapes": (dict,),
    "damping": (float, int),
}


class PayloadError(ValueError):
    """The bytes are not a payload that this version can read."""


def encode(layers: Iterable[LayerCurvature], codec: str, parameters: Mapping[str, Tensor] | None = None) -> bytes:
    """Curvatures as bytes; equal input gives equal bytes.

    Args:
        layers: of which those that have been ``packed`` go as they are.
        codec: the setting (``compression``).
        parameters: the model's, of which only shapes and bytes are read; ``auto`` and ``positions`` need them.

    Raises:
        ValueError: the codec is unknown, a kind of curvature does not travel, or a damping is not a finite
            number >= 0.
        CurvatureError: a matrix is not finite, in float32 where the codec writes that, or far from positive
            semidefinite; names the layer.
    """
    table: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for layer, packed in _packed(layers, codec, parameters):
        if not (math.isfinite(layer.damping) and layer.damping >= 0):
            raise ValueError(f"layer {layer.block.name!r}: damping {layer.damping} is not a finite number >= 0")
        tensors |= prefixed(str(len(table)), packed.tensors)
        table.append(entry_of(layer, packed))
    return _document(table, tensors)


def _document(table: list[dict[str, Any]], tensors: dict[str, Tensor]) -> bytes:
    metadata = {METADATA_KEY: json.dumps({"version": FORMAT_VERSION, "layers": table}, separators=(",", ":"))}
    return save(tensors, metadata)


def pack_layers(
    layers: Iterable[LayerCurvature], codec: str, parameters: Mapping[str, Tensor] | None = None
) -> list[LayerCurvature]:
    """The layers that the codec sends, each with its curvature as it arrives, and ``packed``.

    In its own dtype, but float32 at least, and on its own device. Arguments and errors are those of ``encode``.
    """
    return [_arrived(layer, packed) for layer, packed in _packed(layers, codec, parameters)]


def _packed(
    layers: Iterable[LayerCurvature], codec: str, parameters: Mapping[str, Tensor] | None
) -> list[tuple[LayerCurvature, Packed]]:
    """The layers that the codec sends, as they travel: those that have been packed already as they are."""
    check_codec(codec)
    given = list(layers)
    shapes = None if parameters is None else {key: tuple(value.shape) for key, value in parameters.items()}
    fresh = [layer for layer in given if layer.packed is None]
    for layer in fresh:
        _check_travels(layer)
        _check_finite(layer, layer.curvature.parts())
    if codec.startswith("auto") and fresh:
        if parameters is None or shapes is None:
            raise ValueError(f"codec {codec!r} needs to know the model's parameters")
        total = sum(value.numel() * value.element_size() for value in parameters.values())
        packed = spend(fresh, float(codec.partition("-")[2] or DEFAULT_SHARE) * total - _FRAME)
    else:
        packed = [_compressed(layer, codec, shapes) for layer in fresh]
    made = [(layer, one) for layer, one in zip(fresh, packed, strict=True) if one is not None]
    for layer, one in made:
        _check_finite(layer, one.tensors)
    return [(layer, layer.packed) for layer in given if isinstance(layer.packed, Packed)] + made


def _compressed(layer: LayerCurvature, codec: str, shapes: Mapping[str, Sequence[int]] | None) -> Packed:
    with named(layer):
        return compress(layer, codec, shapes)


def _arrived(layer: LayerCurvature, packed: Packed) -> LayerCurvature:
    like = next(iter(layer.curvature.parts().values()))
    dtype = torch.promote_types(like.dtype, torch.float32)
    return replace(layer, curvature=packed.curvature().to(dtype, like.device), packed=packed)


def decode(
    data: bytes, shapes: Mapping[str, Sequence[int]], max_bytes: int = 1 << 30, max_side: int = 1 << 15
) -> list[LayerCurvature]:
    """Bytes as curvatures, each checked against the model it belongs to.

    Args:
        data: what ``encode`` made.
        shapes: the shape of every parameter of the model, by name.
        max_bytes: payloads longer than this are refused unread, and such whose matrices would take more than
            four times as many: eight numbers can stand for a matrix of any side.
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
    decoded_bytes = 0
    for index, entry in enumerate(entries):
        _check_entry(entry, shapes, seen)
        kind = KINDS[entry["kind"]]
        side = kind.side(entry["shapes"])
        if side > max_side:
            raise PayloadError(f"{_where(entry)}: side {side}, more than the {max_side} allowed")
        decoded_bytes += sum(_DECODED_BYTES * math.prod(shape) for shape in entry["shapes"].values())
        if decoded_bytes > _DECODED_SHARE * max_bytes:
            raise PayloadError(
                f"its matrices have {decoded_bytes} bytes, more than the {_DECODED_SHARE * max_bytes} allowed"
            )
        try:
            needed = layout(kind, entry["shapes"], entry["codecs"])
        except ValueError as error:
            raise PayloadError(f"{_where(entry)}: {error}") from error
        expected |= {f"{index}.{key}": (_DTYPES[dtype], list(shape)) for key, (dtype, shape) in needed.items()}
    _check_tensors(header, expected)
    try:
        tensors = load(data)
        return [_read_layer(index, entry, tensors, shapes) for index, entry in enumerate(entries)]
    except PayloadError:
        raise
    except Exception as error:  # bytes from outside: whatever else is wrong with them, they are no payload
        raise PayloadError(f"not a safetensors document: {error!r:.{_MAX_QUOTE}}") from error


def _travelling() -> list[str]:
    """Looked up each time: users add kinds of their own."""
    return [name for name, kind in KINDS.items() if kind is not Identity]


def _check_travels(layer: LayerCurvature) -> None:
    """Only parts travel: what else a curvature has, as a Kronecker product's weight, must be as it is made."""
    curvature = layer.curvature
    if curvature.kind not in _travelling() or _rest(curvature) != _rest(type(curvature)(**curvature.parts())):
        raise ValueError(f"layer {layer.block.name!r}: curvature of kind {curvature.kind!r} does not travel")
    if not all(part.numel() for part in curvature.parts().values()):
        raise ValueError(f"layer {layer.block.name!r}: curvature without a number does not travel")


def _check_finite(layer: LayerCurvature, tensors: Mapping[str, Tensor]) -> None:
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise CurvatureError(f"layer {layer.block.name!r}: its curvature is not finite; has training diverged?")


def _rest(curvature: Curvature) -> dict[str, Any]:
    parts = curvature.part_names()
    return {key: value for key, value in vars(curvature).items() if key not in parts}


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
    if entry["kind"] not in (kinds := _travelling()):
        raise PayloadError(f"{where}: unknown kind {entry['kind']!r:.{_MAX_QUOTE}}; allowed: {', '.join(kinds)}")
    damping = _to_float(entry["damping"])
    if not (math.isfinite(damping) and damping >= 0):
        raise PayloadError(f"{where}: damping {damping} is not a finite number >= 0")
    _check_parameters(where, entry, shapes, seen)
    parts, codecs = set(KINDS[entry["kind"]].part_names()), entry["codecs"]
    if set(codecs) != parts or not all(isinstance(codec, str) for codec in codecs.values()):
        raise PayloadError(
            f"{where}: a curvature of kind {entry['kind']!r} has a codec for each of "
            f"{', '.join(sorted(parts))}; got {codecs!r:.{_MAX_QUOTE}}"
        )


def _check_parameters(
    where: str, entry: dict[str, Any], shapes: Mapping[str, Sequence[int]], seen: set[str]
) -> None:
    """The parameters exist, belong to one layer only, and form a matrix that the curvature acts on."""
    keys = entry["parameters"]
    if not keys:
        raise PayloadError(f"{where}: no parameters")
    for key in keys:
        if not isinstance(key, str) or key not in shapes:
            raise PayloadError(f"{where}: unknown parameter {key!r:.{_MAX_QUOTE}}")
        if key in seen:
            raise PayloadError(f"{where}: parameter {key!r} has a curvature already")
        seen.add(key)
    for copy, original in entry["copies"].items():
        if copy not in shapes or original not in keys or list(shapes[copy]) != list(shapes[original]):
            raise PayloadError(
                f"{where}: {copy!r:.{_MAX_QUOTE}} is no copy of {original!r:.{_MAX_QUOTE}}: "
                "allowed are parameters of the model, of the shape of one of the layer's"
            )
        if copy in seen:
            raise PayloadError(f"{where}: parameter {copy!r} has a curvature already")
        seen.add(copy)
    rows, columns = matrix_shape([shapes[key] for key in keys])
    _check_shapes(where, entry, rows, columns)


def _check_shapes(where: str, entry: dict[str, Any], rows: int, columns: int) -> None:
    """The curvature has the parts of its kind, of shapes that act on a matrix [rows, columns]."""
    kind, found = KINDS[entry["kind"]], entry["shapes"]
    numbers = [n for shape in found.values() for n in (shape if isinstance(shape, list) else [None])]
    if set(found) != set(kind.part_names()) or any(type(n) is not int or n < 1 for n in numbers):
        raise PayloadError(
            f"{where}: a curvature of kind {entry['kind']!r} has a shape for each of "
            f"{', '.join(kind.part_names())}; got {found!r:.{_MAX_QUOTE}}"
        )
    if not all(found.values()) or not kind.fits(found, rows, columns):
        raise PayloadError(
            f"{where}: shapes {found!r:.{_MAX_QUOTE}} do not fit its parameters, a matrix of {rows} x {columns}"
        )


def _check_tensors(header: dict[str, Any], expected: dict[str, tuple[str, list[int]]]) -> None:
    """The document holds the tensors that the table needs, no other, before any is read."""
    for name in header:
        if name not in expected:
            raise PayloadError(f"tensor of no layer: {name!r:.{_MAX_QUOTE}}")
    for name, (dtype, shape) in expected.items():
        found = header.get(name)
        if not isinstance(found, dict) or (found.get("dtype"), found.get("shape")) != (dtype, shape):
            raise PayloadError(f"tensor {name!r} must be {dtype} {shape}; got {found!r:.{_MAX_QUOTE}}")


def _read_layer(
    index: int, entry: dict[str, Any], tensors: dict[str, Tensor], shapes: Mapping[str, Sequence[int]]
) -> LayerCurvature:
    packed = Packed(entry["kind"], entry["shapes"], entry["codecs"], without_prefix(str(index), tensors))
    curvature = packed.curvature()
    if not all(torch.isfinite(part).all() for part in curvature.parts().values()):
        raise PayloadError(f"{_where(entry)}: the curvature is not finite")
    if (curvature.diagonal(*matrix_shape([shapes[key] for key in entry["parameters"]])) < 0).any():
        raise PayloadError(f"{_where(entry)}: the curvature has a negative number on its diagonal")
    block = Block(entry["name"], tuple(entry["parameters"]), tuple(sorted(entry["copies"].items())))
    return LayerCurvature(block, curvature, _to_float(entry["damping"]))


def _where(entry: dict[str, Any]) -> str:
    return f"layer {entry['name']!r:.{_MAX_QUOTE}}"


def _to_float(number: float) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf
