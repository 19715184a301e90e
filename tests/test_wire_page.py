"""A second decoder, in NumPy, by docs/wire-format.md alone: the golden files say the same by both."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpm_flwr.curvature import matrix_shape
from fedpm_flwr.wire import decode

from .helpers import CODECS
from .test_wire import GOLDEN, SHAPES

Array = np.ndarray[Any, np.dtype[Any]]
_TYPES = {"F32": "<f4", "F64": "<f8", "I8": "i1", "BF16": "<u2"}


def document(data: bytes) -> tuple[list[dict[str, Any]], dict[str, Array]]:
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    table = json.loads(header.pop("__metadata__")["fedpm"])
    assert table["version"] == 1
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        numbers = np.frombuffer(body[start:end], _TYPES[entry["dtype"]])
        if entry["dtype"] == "BF16":  # the upper half of a float32
            numbers = (numbers.astype("<u4") << 16).view("<f4")
        tensors[name] = numbers.reshape(entry["shape"]).astype(np.float64)
    return table["layers"], tensors


def lower(numbers: Array, n: int) -> Array:
    matrix = np.zeros((n, n))
    place = 0
    for row in range(n):
        matrix[row, : row + 1] = numbers[place : place + row + 1]
        place += row + 1
    return matrix


def symmetric(codec: str, of: dict[str, Array], n: int) -> Array:
    """One matrix [n, n]."""
    name, _, number = codec.partition("-")
    if name == "triangle":
        half = lower(of["triangle"], n)
        return np.asarray(half + np.tril(half, -1).T)
    if name == "factor":
        root = lower(of["rows"], n) * of["scale"][:, None]
        return np.asarray(root @ root.T)
    if codec == "spectral-0":
        return np.diag(of["floor.values"])
    if name == "spectral":
        basis = of["basis.values"] * of["basis.scale"]
        return np.asarray(np.eye(n) * of["floor.value"] + basis @ basis.T)
    k = int(number)
    channels, positions = (
        symmetric("factor-int8", {key: of[f"{part}.{key}"] for key in ("rows", "scale")}, side)
        for part, side in (("channels", n // k), ("positions", k))
    )
    matrix = np.zeros((n, n))
    matrix[: n // k * k, : n // k * k] = np.kron(channels, positions)
    if n % k:
        matrix[-1, -1] = of["bias"]
    return matrix


def part_of(codec: str, of: dict[str, Array], shape: list[int], is_symmetric: bool) -> Array:
    if is_symmetric and len(shape) == 3:
        return np.stack(
            [symmetric(codec, {key: each[g] for key, each in of.items()}, shape[-1]) for g in range(shape[0])]
        )
    if is_symmetric:
        return symmetric(codec, of, shape[-1])
    if codec == "constant":
        return np.full(shape, of["value"][..., None])
    return of["values"] * of["scale"] if codec == "columns-int8" else of["values"]


SYMMETRIC = {"factor", "left", "right", "matrix"}


def preconditioner(entry: dict[str, Any], parts: dict[str, Array], r: int, c: int) -> Array:
    """P without λ, on the rows of Δ one after another."""
    match entry["kind"]:
        case "kronecker-right":
            stack = parts["factor"] if parts["factor"].ndim == 3 else parts["factor"][None]
            return blocks([np.kron(np.eye(r // len(stack)), each) for each in stack])
        case "kronecker":
            left, right = (p if p.ndim == 3 else p[None] for p in (parts["left"], parts["right"]))
            return blocks([np.kron(one, other) for one, other in zip(left, right, strict=True)])
        case "diagonal":
            return np.diag(np.broadcast_to(parts["values"], (r, c)).flatten())
        case "low-rank":
            return np.kron(np.eye(r), np.diag(parts["floor"]) + parts["basis"] @ parts["basis"].T)
    return parts["matrix"]


def blocks(matrices: list[Array]) -> Array:
    side = sum(len(each) for each in matrices)
    whole, place = np.zeros((side, side)), 0
    for each in matrices:
        whole[place : place + len(each), place : place + len(each)] = each
        place += len(each)
    return whole


@pytest.mark.parametrize("codec", CODECS)
def test_the_page_says_what_the_bytes_mean(codec: str) -> None:
    data = (GOLDEN / f"{codec}.safetensors").read_bytes()
    table, tensors = document(data)
    found = decode(data, SHAPES)
    assert len(table) == len(found)
    for i, (entry, layer) in enumerate(zip(table, found, strict=True)):
        assert (entry["name"], tuple(entry["parameters"])) == (layer.block.name, layer.block.parameters)
        assert entry["damping"] == layer.damping
        parts = {}
        for part, shape in entry["shapes"].items():
            prefix = f"{i}.{part}."
            of = {key.removeprefix(prefix): each for key, each in tensors.items() if key.startswith(prefix)}
            parts[part] = part_of(entry["codecs"][part], of, shape, part in SYMMETRIC)
        r, c = matrix_shape([SHAPES[key] for key in entry["parameters"]])
        expected = layer.curvature.to_dense(r * c).double().numpy()
        np.testing.assert_allclose(preconditioner(entry, parts, r, c), expected, rtol=1e-5, atol=1e-6)


def test_every_golden_file_is_read() -> None:
    assert {path.stem for path in Path(GOLDEN).glob("*.safetensors")} == set(CODECS)
