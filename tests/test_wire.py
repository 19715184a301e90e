"""The wire format: golden bytes both ways, round trips, and bytes that lie."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fedpm_flwr.curvature import (
    KINDS,
    Block,
    Curvature,
    Dense,
    Diagonal,
    Identity,
    Kronecker,
    KroneckerRight,
    LayerCurvature,
    LowRank,
)
from fedpm_flwr.wire import FORMAT_VERSION, PayloadError, decode, encode, pack_layers

from .helpers import CODECS

GOLDEN = Path(__file__).parent / "golden"
SHAPES = {
    "conv.weight": (2, 1, 1, 2),
    "conv.bias": (2,),
    "grouped.weight": (4, 1, 1, 2),
    "head.weight": (1, 2),
    "tied.weight": (1, 2),
    "kfac.weight": (2, 2),
    "kfac.bias": (3,),
    "embedding.weight": (3, 2),
    "wide.weight": (1, 4),
    "whole.weight": (2, 3),
    "whole.bias": (1,),
}


def golden_layers() -> list[LayerCurvature]:
    """Numbers that float32 holds exactly, so that the codecs of full precision bring them back."""
    factor = torch.tensor([[2.0, 0.5, -1.0], [0.5, 4.0, 0.25], [-1.0, 0.25, 1.0]], dtype=torch.float64)
    hessian = torch.tensor([[3.0, -0.125], [-0.125, 5.0]], dtype=torch.float64)
    rows = torch.tensor([[0.5], [0.0], [0.25]], dtype=torch.float64)
    basis = torch.tensor([[1.0], [-0.5], [0.25], [2.0]], dtype=torch.float64)
    return [
        LayerCurvature(Block("conv", ("conv.weight", "conv.bias")), KroneckerRight(factor), 0.1),
        LayerCurvature(
            Block("grouped", ("grouped.weight",)), KroneckerRight(torch.stack([hessian, 2 * hessian])), 0.5
        ),
        LayerCurvature(Block("head", ("head.weight",), (("tied.weight", "head.weight"),)), Dense(hessian), 1e-12),
        LayerCurvature(Block("kfac", ("kfac.weight",)), Kronecker(hessian, 3 * hessian), 0.0),
        LayerCurvature(Block("embedding", ("embedding.weight",)), Diagonal(rows), 1.0),
        LayerCurvature(Block("wide", ("wide.weight",)), LowRank(basis[:, 0].square() + 1, basis), 2.0),
        LayerCurvature(
            Block("whole", ("whole.weight", "whole.bias")), Dense(torch.diag(torch.arange(1.0, 8.0).double())), 0.0
        ),
    ]


def test_every_kind_that_travels_is_in_the_golden_payload() -> None:
    assert {layer.curvature.kind for layer in golden_layers()} == set(KINDS) - {Identity.kind}


def parts(layer: LayerCurvature) -> dict[str, torch.Tensor]:
    return {name: part.double() for name, part in layer.curvature.parts().items()}


PARAMETERS = {key: torch.empty(shape) for key, shape in SHAPES.items()}


@pytest.mark.parametrize("codec", CODECS)
def test_golden_payload(codec: str) -> None:
    """Written and read as ever: in full precision as it was, else as the client knows that it arrives."""
    stored = (GOLDEN / f"{codec}.safetensors").read_bytes()
    assert encode(golden_layers(), codec, PARAMETERS) == stored
    sent = pack_layers(golden_layers(), codec, PARAMETERS)
    assert encode(sent, codec) == stored
    exact = codec.startswith("triangle-float")
    assert not exact or encode(decode(stored, SHAPES), codec) == stored
    for found, expected in zip(decode(stored, SHAPES), golden_layers() if exact else sent, strict=True):
        assert (found.block, found.damping) == (expected.block, expected.damping)
        assert type(found.curvature) is type(expected.curvature)
        assert found.curvature.kind == expected.curvature.kind
        assert {k: v.tolist() for k, v in parts(found).items()} == {
            k: v.tolist() for k, v in parts(expected).items()
        }


@pytest.mark.parametrize(
    ("codec", "dtype"), [("triangle-float32", torch.float32), ("triangle-float64", torch.float64)]
)
@given(side=st.integers(1, 40), seed=st.integers(0, 1000), damping=st.floats(0, 1e6))
@settings(max_examples=25)
def test_round_trip(codec: str, dtype: torch.dtype, side: int, seed: int, damping: float) -> None:
    x = torch.randn(2 * side, side, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    block = Block("l", ("w",))
    data = encode([LayerCurvature(block, KroneckerRight(x.T @ x), damping)], codec)
    (found,) = decode(data, {"w": (3, side)})
    assert isinstance(found.curvature, KroneckerRight)
    assert torch.equal(found.curvature.factor, torch.tril(x.T @ x) + torch.tril(x.T @ x, -1).T)
    assert found.damping == damping
    assert found.block == block


def test_nothing_to_send_is_a_payload_too() -> None:
    assert decode(encode([], "triangle-float32"), SHAPES) == []


def test_the_identity_does_not_travel() -> None:
    with pytest.raises(ValueError, match="layer 'l': curvature of kind 'identity' does not travel"):
        encode([LayerCurvature(Block("l", ("w",)), Identity(), 0.0)], "triangle-float32")


@pytest.mark.parametrize(
    "changed",
    [Kronecker(torch.eye(2), torch.eye(2)).damped(1.0), Kronecker(torch.eye(2), torch.eye(2)).scaled(2.0)],
)
def test_a_damped_or_weighted_product_does_not_travel_since_only_its_factors_would(changed: Kronecker) -> None:
    with pytest.raises(ValueError, match="layer 'l': curvature of kind 'kronecker' does not travel"):
        encode([LayerCurvature(Block("l", ("w",)), changed, 0.0)], "triangle-float32")


def test_an_unknown_codec_is_named() -> None:
    with pytest.raises(ValueError, match="unknown codec 'zip'; allowed: triangle-float64, triangle-float32"):
        encode([], "zip")


@pytest.mark.parametrize("damping", [float("nan"), float("inf"), -1.0])
def test_a_damping_that_would_be_refused_is_not_sent(damping: float) -> None:
    layer = LayerCurvature(Block("l", ("w",)), KroneckerRight(torch.eye(2)), damping)
    with pytest.raises(ValueError, match="layer 'l': damping"):
        encode([layer], "triangle-float32")


def payload(version: object = FORMAT_VERSION, tensor: torch.Tensor | None = None, **changes: object) -> bytes:
    """A payload of one layer with some of its entry changed."""
    entry = {
        "name": "head",
        "parameters": ["head.weight"],
        "copies": {},
        "kind": "kronecker-right",
        "codecs": {"factor": "triangle-float32"},
        "shapes": {"factor": [2, 2]},
        "damping": 1.0,
    } | changes
    document = json.dumps({"version": version, "layers": [entry]})
    return save({"0.factor.triangle": torch.ones(3) if tensor is None else tensor}, {"fedpm": document})


def test_the_payload_that_the_lies_are_made_of_is_read() -> None:
    assert len(decode(payload(), SHAPES)) == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "header of 0 bytes"),
        (b"\xff" * 8, "header"),
        (b"\xff" * 100, "header"),
        (payload()[:-1], "not a safetensors document|header of"),
        (payload() + b"\0", "not a safetensors document"),
        (save({"x": torch.ones(1)}), "metadata"),
        (save({"x": torch.ones(1)}, {"fedpm": "[]"}), "metadata"),
        (save({"x": torch.ones(1)}, {"fedpm": '{"version": 1, "layers": 3}'}), "no list of layers"),
        (save({}, {"fedpm": "[" * 100_000}), "metadata"),
        (save({"x": torch.ones(1)}, {"fedpm": '{"version": 1, "layers": []}'}), "tensor of no layer: 'x'"),
        (payload(version=2), "format version 2; this library reads 1"),
        (payload(version=None), "format version None"),
        (payload(version=True), "format version True"),
        (payload(version=1.0), "format version 1.0"),
        (payload(name=3), "a layer's entry must have"),
        (payload(shapes=True), "a layer's entry must have"),
        (payload(shapes={}), "has a shape for each of factor; got {}"),
        (payload(shapes={"factor": [2, 2], "more": [1]}), "has a shape for each of factor"),
        (payload(shapes={"factor": 2}), "has a shape for each of factor"),
        (payload(shapes={"factor": [2, True]}), "has a shape for each of factor"),
        (payload(shapes={"factor": [2, 2.0]}), "has a shape for each of factor"),
        (payload(shapes={"factor": []}), r"shapes {'factor': \[\]} do not fit"),
        (payload(shapes={"factor": [2]}), r"do not fit its parameters, a matrix of 1 x 2"),
        (payload(shapes={"factor": [2, 2, 2]}), "do not fit its parameters, a matrix of 1 x 2"),
        (payload(shapes={"factor": [1, 1, 2, 2]}), "do not fit its parameters, a matrix of 1 x 2"),
        (payload(kind="kronecker"), "has a shape for each of left, right"),
        (payload(kind="kronecker", shapes={"left": [1], "right": [2]}), "do not fit"),
        (payload(kind="kronecker", shapes={"left": [1, 1, 1], "right": [2, 2]}), "do not fit"),
        (payload(kind="kronecker", shapes={"left": [1, 1], "right": [3, 3]}), "do not fit"),
        (payload(kind="diagonal", shapes={"values": [2, 1]}), "do not fit"),
        (payload(kind="diagonal", shapes={"values": [2]}), "do not fit"),
        (payload(kind="low-rank", shapes={"floor": [2], "basis": [2, 3]}), "do not fit"),
        (payload(kind="low-rank", shapes={"floor": [1], "basis": [2, 1]}), "do not fit"),
        (payload(kind="dense", shapes={"matrix": [2]}), "do not fit"),
        (
            payload(kind="nonsense"),
            "layer 'head': unknown kind 'nonsense'; allowed: diagonal, dense, kronecker-right",
        ),
        (payload(codecs={"factor": "zip"}), "layer 'head': unknown codec 'zip'; allowed: triangle-float64"),
        (payload(codecs={"factor": "values-float32"}), "layer 'head': unknown codec 'values-float32'"),
        (payload(codecs={"factor": "spectral-"}), "layer 'head': unknown codec 'spectral-'"),
        (payload(codecs={"factor": "spectral-3"}), "layer 'head': a matrix of side 2 has no rank 3"),
        (payload(codecs={"factor": "spectral-99999999"}), "layer 'head': unknown codec"),
        (payload(codecs={"factor": "spectral-²"}), "layer 'head': unknown codec"),
        (payload(codecs={"factor": "positions-0"}), "layer 'head': unknown codec 'positions-0'"),
        (payload(codecs={"factor": "positions-3"}), "layer 'head': a matrix of side 2 is not one of 3 kernel"),
        (payload(codecs={"factor": 3}), "layer 'head': .* has a codec for each of factor; got {'factor': 3}"),
        (payload(codecs={}), "layer 'head': .* has a codec for each of factor; got {}"),
        (payload(codecs={"factor": "factor-int8", "more": ""}), "has a codec for each of factor"),
        (payload(codecs={"factor": "factor-int8"}), "tensor of no layer: '0.factor.triangle'"),
        (payload(damping=-1.0), "layer 'head': damping -1.0"),
        (payload(damping=float("nan")), "layer 'head': damping nan"),
        (payload(damping=float("inf")), "layer 'head': damping inf"),
        (payload(damping=10**400), "layer 'head': damping inf"),
        (payload(parameters=[]), "layer 'head': no parameters"),
        (payload(copies={"no.weight": "head.weight"}), "'no.weight' is no copy of 'head.weight'"),
        (payload(copies={"tied.weight": "conv.weight"}), "'tied.weight' is no copy of 'conv.weight'"),
        (payload(copies={"tied.weight": ["head.weight"]}), "'tied.weight' is no copy of"),
        (payload(copies={"kfac.weight": "head.weight"}), "'kfac.weight' is no copy of 'head.weight'"),
        (payload(copies={"head.weight": "head.weight"}), "parameter 'head.weight' has a curvature already"),
        (payload(parameters=["no.weight"]), "layer 'head': unknown parameter 'no.weight'"),
        (payload(parameters=[["head.weight"]]), "layer 'head': unknown parameter"),
        (payload(parameters=["head.weight"] * 2), "parameter 'head.weight' has a curvature already"),
        (payload(parameters=["head.weight", "conv.bias"]), "a matrix of 1 x 4"),
        (payload(shapes={"factor": [1 << 40, 1 << 40]}), "layer 'head': shapes .* do not fit"),
        (payload(shapes={"factor": [-2, -2]}), "has a shape for each of factor"),
        (payload(parameters=["conv.weight", "conv.bias"]), "do not fit its parameters, a matrix of 2 x 3"),
        (payload(tensor=torch.ones(4)), r"tensor '0.factor.triangle' must be F32 \[3\]"),
        (payload(tensor=torch.ones(3, 1)), r"tensor '0.factor.triangle' must be F32 \[3\]"),
        (
            payload(tensor=torch.ones(3, dtype=torch.float64)),
            r"tensor '0.factor.triangle' must be F32 \[3\]; got .*F64",
        ),
        (payload(tensor=torch.tensor([1.0, torch.nan, 1.0])), "layer 'head': the curvature is not finite"),
        (payload(tensor=torch.tensor([1.0, 0.0, -1.0])), "layer 'head': the curvature has a negative number"),
    ],
)
def test_bytes_that_lie_raise_the_one_error(data: bytes, message: str) -> None:
    with pytest.raises(PayloadError, match=message):
        decode(data, SHAPES)


def with_header(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


NOTHING = {"fedpm": json.dumps({"version": 1, "layers": []})}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([], "no metadata"),
        ({"__metadata__": [3]}, "'fedpm' metadata"),
        ({"__metadata__": {"fedpm": 3}}, "'fedpm' metadata"),
        ({"__metadata__": NOTHING | {"more": 3}}, "not a safetensors document"),
        (
            {"__metadata__": NOTHING, "x": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}},
            "tensor of no layer: 'x'",
        ),
        ({"__metadata__": NOTHING} | {f"tensor {i}": 0 for i in range(50_000)}, "tensor of no layer: 'tensor 0'"),
    ],
)
def test_headers_that_lie_raise_the_one_error_in_few_words(header: object, message: str) -> None:
    with pytest.raises(PayloadError, match=message) as raised:
        decode(with_header(header), {})
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("field", ["dtype", "shape", "data_offsets"])
@pytest.mark.parametrize("lie", [None, "F8", "BF16", [0, 2**63], [2**64], [-1], [3.0], {}, [0, 2**70], 12])
def test_a_tensor_that_lies_about_itself(field: str, lie: object) -> None:
    honest = payload()
    length = int.from_bytes(honest[:8], "little")
    header = json.loads(honest[8 : 8 + length])
    header["0.factor.triangle"][field] = lie
    with pytest.raises(PayloadError):
        decode(with_header(header, honest[8 + length :]), SHAPES)


@pytest.mark.parametrize(
    ("curvature", "side"),
    [
        (KroneckerRight(torch.eye(6)), 6),
        (KroneckerRight(torch.eye(6).expand(4, 6, 6)), 12),  # as many numbers as a matrix of this side
        (Dense(torch.eye(24)), 24),
        (Kronecker(torch.eye(4), torch.eye(6)), 6),
        (LowRank(torch.ones(6), torch.ones(6, 1)), 6),  # a sum of which may become a matrix
    ],
)
def test_a_matrix_over_the_limit_is_refused_unread(curvature: Curvature, side: int) -> None:
    data = encode([LayerCurvature(Block("l", ("w",)), curvature, 0.0)], "triangle-float32")
    assert len(decode(data, {"w": (4, 6)}, max_side=side)) == 1
    with pytest.raises(PayloadError, match=f"layer 'l': side {side}, more than the {side - 1} allowed"):
        decode(data, {"w": (4, 6)}, max_side=side - 1)


def test_a_payload_over_the_limit_is_refused_unread() -> None:
    with pytest.raises(PayloadError, match="more than the 10 allowed"):
        decode(payload(), SHAPES, max_bytes=10)


def test_few_bytes_that_stand_for_large_matrices_are_refused_unread() -> None:
    """A curvature of rank 1 is 100 numbers; the dense one that it may say to be takes 40 KB."""
    block = Block("l", ("w",))
    data = encode([LayerCurvature(block, Dense(torch.eye(100)), 1.0)], "rank-1")
    assert len(decode(data, {"w": (10, 10)}, max_bytes=10_000)) == 1
    with pytest.raises(PayloadError, match="its matrices have 40000 bytes, more than the 39996 allowed"):
        decode(data, {"w": (10, 10)}, max_bytes=9_999)


def test_many_matrices_count_together() -> None:
    layers = [LayerCurvature(Block(key, (key,)), Dense(torch.eye(100)), 1.0) for key in "ab"]
    data, shapes = encode(layers, "rank-1"), {"a": (10, 10), "b": (10, 10)}
    assert len(decode(data, shapes, max_bytes=20_000)) == 2
    with pytest.raises(PayloadError, match="its matrices have 80000 bytes, more than the 79996 allowed"):
        decode(data, shapes, max_bytes=19_999)


def test_a_copy_belongs_to_one_layer_only() -> None:
    """Else the two would each move it."""
    one, two = (Block(key, (key,), (("copy", key),)) for key in "ab")
    data = encode([LayerCurvature(block, KroneckerRight(torch.eye(2)), 1.0) for block in (one, two)], "diagonal")
    with pytest.raises(PayloadError, match="layer 'b': parameter 'copy' has a curvature already"):
        decode(data, {"a": (1, 2), "b": (1, 2), "copy": (1, 2)})


@given(st.data())
@settings(max_examples=300)
def test_damaged_bytes_raise_the_one_error_or_are_valid(data: st.DataObject) -> None:
    codec = data.draw(st.sampled_from(sorted(CODECS)))
    damaged = bytearray(encode(golden_layers(), codec, PARAMETERS))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(damaged)))
    try:
        layers = decode(bytes(damaged[:cut] if data.draw(st.booleans()) else damaged), SHAPES)
    except PayloadError:
        return
    for layer in layers:
        assert all(torch.isfinite(part).all() for part in parts(layer).values())
        assert set(layer.block.parameters) <= set(SHAPES)
