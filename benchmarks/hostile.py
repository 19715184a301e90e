"""Payloads that are broken or lie: each is decoded to something valid, or refused by the one error there is.

    python -m benchmarks.hostile [--cases 100000] [--seed 0]

Every codec's payload of layers of every kind, changed at random: bits flipped, bytes cut off, put in, overwritten
or repeated, and lies in the header: other sizes, dtypes, places, ranks, codecs, kinds, names, numbers that are
none, missing and further entries, headers of any length. What ``decode`` then gives must be finite, with no
negative number on a diagonal, and must fit the model; whatever it raises but PayloadError ends the campaign, with
the case's seed.

Columns: cases; decoded and refused, how many of them; slowest_ms, of one decoding; and in the foot by how much the
process grew. No payload may ask for more than 4 times the bytes that a payload may have.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fedpm_flwr.curvature import (
    Block,
    Curvature,
    Dense,
    Diagonal,
    Kronecker,
    KroneckerRight,
    LayerCurvature,
    LowRank,
    matrix_shape,
)
from fedpm_flwr.wire import PayloadError, decode, encode

from .arguments import make_parser
from .machine import peak_bytes
from .table import Row, publish

CODECS = [
    "triangle-float64",
    "triangle-float32",
    "triangle-bfloat16",
    "triangle-int8",
    "positions",
    "diagonal",
    "rank-1",
    "rank-2",
    "rank-0.9",
    "auto-99",
]
MAX_BYTES = 1 << 20
_SHAPES: dict[str, tuple[int, ...]] = {
    "conv.weight": (4, 2, 2, 2),
    "conv.bias": (4,),
    "grouped.weight": (4, 1, 1, 3),
    "head.weight": (3, 6),
    "tied.weight": (3, 6),
    "kfac.weight": (3, 4),
    "embedding.weight": (5, 3),
    "low.weight": (2, 8),
    "whole.weight": (2, 3),
    "whole.bias": (1,),
}
_ODD: list[Any] = [
    *(
        None,
        True,
        -1,
        0,
        1,
        2,
        7,
        2**31,
        2**63,
        10**30,
        1.5,
        -0.0,
        float("nan"),
        float("inf"),
        "",
        "x",
        "F32",
        "I8",
    ),
    *(
        "BF16",
        "F64",
        "BOOL",
        "U64",
        "dense",
        "low-rank",
        "identity",
        "sum",
        "spectral-3",
        "spectral-99999",
        "positions-4",
    ),
    *(
        "positions-0",
        "triangle-float32",
        "factor-int8",
        "constant",
        [],
        {},
        [0],
        [-1],
        [2**40, 2**40],
        [3, 3],
        [[]],
    ),
]
"""What a lie says in place of the truth."""


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parse(arguments)
    payloads = {codec: make_payload(codec) for codec in CODECS}
    for codec, payload in payloads.items():
        assert decode(payload, _SHAPES, MAX_BYTES), codec
    before = peak_bytes()
    rows = [attack(codec, payload, given.cases // len(CODECS), given.seed) for codec, payload in payloads.items()]
    foot = f"the process's largest memory grew by {(peak_bytes() - before) / 1e6:.1f} MB"
    publish("hostile", rows, given.output, foot, seed=given.seed)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("hostile", __doc__)
    parser.add_argument("--cases", type=int, default=100_000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    given = parser.parse_args(arguments)
    if given.cases < len(CODECS):
        parser.error(f"--cases={given.cases} is not allowed; allowed: >= {len(CODECS)}")
    return given


def make_payload(codec: str) -> bytes:
    """Layers of every kind, by this codec."""
    generator = torch.Generator().manual_seed(0)

    def positive(*shape: int) -> torch.Tensor:
        root = torch.randn(*shape, generator=generator)
        return root @ root.mT + torch.eye(shape[-1])

    layers: list[tuple[tuple[str, ...], Curvature]] = [
        (("conv.weight", "conv.bias"), KroneckerRight(positive(9, 9))),
        (("grouped.weight",), KroneckerRight(positive(2, 3, 3))),
        (("kfac.weight",), Kronecker(positive(3, 3), positive(4, 4))),
        (("embedding.weight",), Diagonal(torch.rand(5, 3, generator=generator))),
        (("low.weight",), LowRank(torch.ones(8), torch.randn(8, 2, generator=generator))),
        (("whole.weight", "whole.bias"), Dense(positive(7, 7))),
    ]
    tied = Block("head", ("head.weight",), (("tied.weight", "head.weight"),))
    given = [LayerCurvature(Block(names[0], names), curvature, 0.5) for names, curvature in layers]
    given.append(LayerCurvature(tied, KroneckerRight(positive(6, 6)), 1.0))
    return encode(given, codec, {key: torch.zeros(shape) for key, shape in _SHAPES.items()})


def attack(codec: str, payload: bytes, cases: int, seed: int) -> Row:
    """So many changes of a payload, each of which is decoded."""
    decoded, slowest = 0, 0.0
    for case in range(cases):
        chance = random.Random(f"{seed}/{codec}/{case}")
        changed = chance.choice(_CHANGES)(payload, chance)
        started = time.perf_counter()
        try:
            layers = decode(changed, _SHAPES, MAX_BYTES)
        except PayloadError:
            layers = None
        except BaseException:
            print(f"codec {codec}, seed {seed}, case {case}", file=sys.stderr)
            raise
        slowest = max(slowest, time.perf_counter() - started)
        if layers is not None:
            decoded += 1
            check(layers)
    return {
        "codec": codec,
        "cases": cases,
        "decoded": decoded,
        "refused": cases - decoded,
        "slowest_ms": float(f"{1000 * slowest:.3g}"),
    }


def check(layers: Sequence[LayerCurvature]) -> None:
    """What is decoded can be computed with."""
    for layer in layers:
        rows, columns = matrix_shape([_SHAPES[key] for key in layer.block.parameters])
        product = (
            layer.curvature.to(torch.float64).damped(layer.damping).matmul(torch.ones(rows, columns).double())
        )
        assert product.shape == (rows, columns)
        assert all(torch.isfinite(part).all() for part in layer.curvature.parts().values())
        assert (layer.curvature.diagonal(rows, columns) >= 0).all()
        assert layer.damping >= 0


def _flip(payload: bytes, chance: random.Random) -> bytes:
    changed = bytearray(payload)
    for _ in range(chance.choice((1, 1, 1, 2, 8, 64))):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _cut(payload: bytes, chance: random.Random) -> bytes:
    start, end = sorted((chance.randrange(len(payload) + 1), chance.randrange(len(payload) + 1)))
    return chance.choice((payload[:end], payload[start:], payload[:start] + payload[end:]))


def _insert(payload: bytes, chance: random.Random) -> bytes:
    place, size = chance.randrange(len(payload) + 1), chance.choice((1, 7, 8, 100, 5000))
    new = chance.choice(
        (chance.randbytes(size), b"\x00" * size, b"\xff" * size, b"[" * size, payload[place : place + size])
    )
    return chance.choice(
        (payload[:place] + new + payload[place:], payload[:place] + new + payload[place + size :])
    )


def _numbers(payload: bytes, chance: random.Random) -> bytes:
    """NaN, infinities and large numbers among those of the tensors."""
    header = 8 + int.from_bytes(payload[:8], "little")
    place = chance.randrange(header, len(payload))
    new = chance.choice(
        (b"\xff\xff\xff\xff", b"\x00\x00\x80\x7f", b"\x00\x00\xc0\x7f", b"\xff\xff\x7f\x7f", b"\x80\x80")
    )
    return payload[:place] + new + payload[place + len(new) :]


def _length(payload: bytes, chance: random.Random) -> bytes:
    """A header that says it is of another length."""
    length = chance.choice((0, 1, len(payload), 2**31, 2**63, 2**64 - 1, chance.randrange(2 * len(payload))))
    return length.to_bytes(8, "little") + payload[8:]


def _lie(payload: bytes, chance: random.Random) -> bytes:
    """A header, or its table, that says something else, and is well formed."""
    end = 8 + int.from_bytes(payload[:8], "little")
    header = json.loads(payload[8:end])
    table = json.loads(header["__metadata__"]["fedpm"])
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        _change_one(chance.choice((header, table, table["layers"])) if table.get("layers") else header, chance)
    if isinstance(header.get("__metadata__"), dict) and chance.random() < 0.95:
        header["__metadata__"]["fedpm"] = json.dumps(table)
    new = json.dumps(header).encode()
    return len(new).to_bytes(8, "little") + new + payload[end:]


def _change_one(inside: Any, chance: random.Random) -> None:
    """Somewhere in nested lists and tables: another value, one less, one more, or two in each other's place."""
    while isinstance(inside, dict | list) and inside:
        key = chance.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
        if isinstance(inside[key], dict | list) and inside[key] and chance.random() < 0.8:
            inside = inside[key]
            continue
        match chance.randrange(4):
            case 0:
                del inside[key]
            case 1 if isinstance(inside, dict):
                inside[chance.choice(("x", "0.factor.rows", "shapes", "codecs"))] = chance.choice(_ODD)
            case 2:
                other = chance.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
                inside[key], inside[other] = inside[other], inside[key]
            case _:
                inside[key] = chance.choice(_ODD)
        return


_CHANGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(_flip, _flip, _cut, _insert, _numbers, _numbers, _length),
    *(_lie, _lie, _lie, _lie, _lie),
)

if __name__ == "__main__":
    sys.exit(main())
