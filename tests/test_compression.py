"""What each codec keeps: positive semidefinite whatever is rounded, near to the matrix, within its bytes."""

import warnings
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedpm_flwr.config import ConfigError, check_codec
from fedpm_flwr.curvature import (
    Block,
    Curvature,
    CurvatureError,
    Diagonal,
    Kronecker,
    KroneckerRight,
    LayerCurvature,
    LowRank,
    plus,
)
from fedpm_flwr.curvature.linalg import leading
from fedpm_flwr.optim import FOOF, KFAC, SecondOrder, Sophia
from fedpm_flwr.tasks import build_model
from fedpm_flwr.wire import Packed, decode, encode, pack_layers
from fedpm_flwr.wire.compression import by_dtype
from fedpm_flwr.wire.positions import Positions, nearest_product
from fedpm_flwr.wire.rounded_factor import unit_cholesky
from fedpm_flwr.wire.values import Int8Columns

from .helpers import CODECS, relative_error, spd

BLOCK = Block("layer", ("weight",))
LOSSY = [codec for codec in CODECS if not codec.startswith("triangle-float")]


def arrived(matrix: Tensor, codec: str, weight: tuple[int, ...] | None = None, damping: float = 1.0) -> Curvature:
    """FOOF's A of a weight of this shape, by default [3, columns], as it arrives."""
    parameters = {"weight": torch.empty(weight or (3, len(matrix)), device="meta")}
    (layer,) = pack_layers([LayerCurvature(BLOCK, KroneckerRight(matrix), damping)], codec, parameters)
    (decoded,) = decode(encode([layer], codec), {key: tuple(p.shape) for key, p in parameters.items()})
    for own, other in zip(layer.curvature.parts().values(), decoded.curvature.parts().values(), strict=True):
        assert torch.equal(own, other.to(own))  # the client knows to the bit what the server reads
    return decoded.curvature


def as_matrix(curvature: Curvature, side: int) -> Tensor:
    return curvature.to_dense(side).double()


def moments(side: int, examples: int, seed: int = 0) -> Tensor:
    """E[xxᵀ] of correlated inputs: singular, if they are fewer than its side, and of scales from 1 to 100."""
    generator = torch.Generator().manual_seed(seed)
    scales = 10 ** torch.linspace(0, 1, side)
    x = torch.randn(examples, side, generator=generator).cumsum(1) / side**0.5 * scales
    matrix: Tensor = x.T @ x / examples
    return matrix


@pytest.mark.parametrize("codec", LOSSY)
@given(
    side=st.integers(1, 30),
    examples=st.integers(1, 60),
    seed=st.integers(0, 99),
    zeros=st.integers(0, 3),
    scale=st.sampled_from([1e-30, 1e-12, 1.0, 1e12, 1e30]),
)
@settings(max_examples=40)
def test_what_arrives_is_positive_semidefinite(
    codec: str, side: int, examples: int, seed: int, zeros: int, scale: float
) -> None:
    """Singular too, or with inputs that are always 0; within float32's rounding, which any damping outweighs."""
    matrix = moments(side, examples, seed) * scale
    matrix[:zeros] = matrix[:, :zeros] = 0.0
    found = as_matrix(arrived(matrix, codec), side)
    assert torch.equal(found, found.mT)
    values = torch.linalg.eigvalsh(found)
    assert values[0] >= -1e-6 * values[-1]
    assert float(found.trace()) == pytest.approx(float(matrix.trace()), rel=0.03)


@pytest.mark.parametrize("codec", ["triangle-bfloat16", "triangle-int8"])
def test_at_side_4608_and_damping_1e_4(codec: str) -> None:
    """The largest matrix of a ResNet18, singular, of unit diagonal: what makes rounding A itself indefinite."""
    x = torch.randn(500, 4608, generator=torch.Generator().manual_seed(0))
    x = x / x.square().mean(0).sqrt()
    curvature = arrived(x.T @ x / 500, codec, (1, 4608))
    curvature.to(torch.float64).damped(1e-4).check_positive_definite()
    assert torch.allclose(curvature.diagonal(1, 4608), torch.ones(1, 4608), atol=1e-4)


@pytest.mark.parametrize(("codec", "most"), [("triangle-bfloat16", 0.01), ("triangle-int8", 0.02)])
def test_a_rounded_factor_is_near(codec: str, most: float) -> None:
    matrix = spd(60, torch.Generator().manual_seed(3))
    assert relative_error(as_matrix(arrived(matrix, codec), 60), matrix) < most


def test_a_matrix_that_is_not_finite_is_not_sent() -> None:
    for codec in LOSSY:
        with pytest.raises(ValueError, match="finite"):
            encode(
                [LayerCurvature(BLOCK, KroneckerRight(torch.full((3, 3), torch.nan)), 1.0)],
                codec,
                {"weight": torch.empty(2, 3)},
            )


def test_eigenvectors_come_nearer_one_by_one_and_keep_the_trace() -> None:
    matrix = moments(60, 200)
    found = [as_matrix(arrived(matrix, f"rank-{r}"), 60) for r in (1, 2, 4, 8, 16)]
    errors = [relative_error(one, matrix) for one in found]
    assert all(later < earlier for earlier, later in pairwise(errors))
    assert errors[-1] < 0.03
    for one in found:
        assert float(one.trace()) == pytest.approx(float(matrix.trace()), rel=0.01)
    diagonal = as_matrix(arrived(matrix, "diagonal"), 60)
    torch.testing.assert_close(diagonal, matrix.double().diag().diag(), rtol=0.005, atol=0.0)


def test_the_rest_and_a_few_eigenvectors_are_not_counted_twice() -> None:
    """A spike beside white noise: the floor is the noise, and the eigenvalue of the spike is its own."""
    direction = torch.full((40,), 40**-0.5)
    matrix = torch.eye(40) + 9 * direction.outer(direction)
    found = as_matrix(arrived(matrix, "rank-1"), 40)
    assert relative_error(found, matrix) < 0.01


def test_leading_eigenvectors_of_a_large_matrix() -> None:
    matrix = moments(700, 300)
    values, vectors = leading(matrix, 12)
    exact = torch.linalg.eigvalsh(matrix.double()).flip(0)[:12]
    torch.testing.assert_close(values.double(), exact, rtol=0.02, atol=0.0)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(12), rtol=0, atol=1e-4)
    assert torch.equal(vectors, leading(matrix, 12)[1])


@pytest.mark.parametrize(("side", "share"), [(60, 0.5), (60, 0.9), (700, 0.5)])
def test_a_rank_by_its_share_is_the_least_that_holds_it(side: int, share: float) -> None:
    matrix = moments(side, 300)
    found = arrived(matrix, f"rank-{share}")
    assert isinstance(found, LowRank)
    held = torch.linalg.eigvalsh(matrix.double()).flip(0).cumsum(0) / matrix.trace()
    assert found.basis.shape[1] == int((held < share).sum()) + 1


def test_more_eigenvectors_than_a_triangle_has_bytes_are_sent_as_one() -> None:
    assert isinstance(arrived(moments(20, 50), "rank-8"), LowRank)
    assert isinstance(arrived(moments(20, 50), "rank-19"), KroneckerRight)
    assert isinstance(arrived(moments(20, 50), "rank-1000"), KroneckerRight)


@pytest.mark.parametrize("bias", [False, True])
def test_positions_are_exact_for_a_product(bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    product = torch.kron(spd(5, generator), spd(9, generator))
    matrix = torch.block_diag(product, torch.ones(1, 1).double()) if bias else product
    # The bias of a block is part of its columns: here a weight with room for it.
    parameters = {"weight": torch.empty(4, 5, 3, 3), **({"bias": torch.empty(4)} if bias else {})}
    layer = LayerCurvature(Block("layer", tuple(parameters)), KroneckerRight(matrix), 1.0)
    payload = encode([layer], "positions", parameters)
    (found,) = decode(payload, {key: tuple(p.shape) for key, p in parameters.items()})
    assert relative_error(as_matrix(found.curvature, len(matrix)), matrix) < 0.02
    assert len(payload) < len(encode([layer], "triangle-int8"))


def test_the_nearest_product_is_that_of_van_loan_and_pitsianis() -> None:
    matrix = moments(24, 100).double()
    c, q = nearest_product(matrix.reshape(6, 4, 6, 4))
    rearranged = matrix.reshape(6, 4, 6, 4).permute(0, 2, 1, 3).reshape(36, 16)
    u, s, v = torch.linalg.svd(rearranged, full_matrices=False)
    best = torch.outer(u[:, 0] * s[0], v[0])
    found = torch.outer(c.flatten(), q.flatten())
    assert (found - rearranged).norm() < (best - rearranged).norm() * 1.001


def network_curvature(
    name: str, make: Callable[..., SecondOrder] = FOOF, **options: Any
) -> tuple[list[LayerCurvature], dict[str, Tensor]]:
    model = build_model(name, (1, 16, 16), 10, 0)
    optimizer = make(model, lr=0.1, **options)
    x = torch.rand(32, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    loss = F.cross_entropy(model(x), torch.arange(32) % 10)
    optimizer.measure(loss)
    loss.backward()
    optimizer.step()
    return optimizer.preconditioners(), dict(model.state_dict())


def errors_of(layers: list[LayerCurvature], payload: bytes, parameters: Mapping[str, Tensor]) -> dict[str, float]:
    """By layer; 1 for those that are not sent."""
    found = {one.block: one for one in decode(payload, {key: tuple(p.shape) for key, p in parameters.items()})}
    errors = {}
    for layer in layers:
        assert isinstance(layer.curvature, KroneckerRight)
        side, exact = layer.curvature.factor.shape[-1], layer.curvature.factor.double()
        errors[layer.block.name] = (
            relative_error(as_matrix(found[layer.block].curvature, side), exact) if layer.block in found else 1.0
        )
    return errors


BUDGETS = (0.003, 0.01, 0.02, 0.05, 0.1, 0.5, 2.0)


@pytest.mark.parametrize(
    ("name", "make", "options"),
    [
        ("lenet", FOOF, {"damping": 0.1}),
        ("cnn", FOOF, {"damping": 1e-3}),
        ("lenet", KFAC, {"damping": 0.1}),
        ("mlp", Sophia, {}),
    ],
)
def test_a_budget_is_kept_and_used(name: str, make: Callable[..., SecondOrder], options: dict[str, Any]) -> None:
    layers, parameters = network_curvature(name, make, **options)
    total = sum(p.numel() * p.element_size() for p in parameters.values())
    most = len(encode(layers, "triangle-int8"))
    for share in BUDGETS:
        payload = encode(layers, f"auto-{share}", parameters)
        assert len(payload) <= max(share * total, len(encode([], "auto-1", parameters)))
        if make is FOOF and share >= 0.02:
            assert len(payload) > min(0.8 * share * total, 0.9 * most)
    assert encode(layers, "auto", parameters) == encode(layers, "auto-0.05", parameters)


def test_a_larger_budget_brings_every_layer_nearer() -> None:
    layers, parameters = network_curvature("lenet", damping=0.1)
    rows = [errors_of(layers, encode(layers, f"auto-{share}", parameters), parameters) for share in BUDGETS]
    for smaller, larger in pairwise(rows):
        for layer, error in larger.items():
            assert error <= smaller[layer] + 0.02
    assert max(rows[0].values()) == 1.0
    assert max(rows[-1].values()) < 0.02
    diagonal = errors_of(layers, encode(layers, "diagonal"), parameters)
    at_5 = rows[BUDGETS.index(0.05)]
    assert sum(at_5.values()) < 0.5 * sum(diagonal.values())


def test_diagonals_are_sent_by_their_mean_row_where_all_are_too_many() -> None:
    values = torch.rand(50, 40) + 0.5
    layer, parameters = LayerCurvature(BLOCK, Diagonal(values), 0.0), {"weight": torch.empty(50, 40)}
    shapes = {"weight": (50, 40)}
    (few,), (all_of_them,) = (decode(encode([layer], f"auto-{share}", parameters), shapes) for share in (0.1, 1.0))
    torch.testing.assert_close(few.curvature.parts()["values"], values.mean(0, keepdim=True), rtol=0.01, atol=0)
    torch.testing.assert_close(all_of_them.curvature.parts()["values"], values, rtol=0.01, atol=0)


@pytest.mark.parametrize("codec", ["auto", "positions"])
def test_what_needs_the_model_says_so(codec: str) -> None:
    layer = LayerCurvature(BLOCK, KroneckerRight(torch.eye(3)), 1.0)
    with pytest.raises(ValueError, match=f"codec '{codec}' needs to know the model's parameter"):
        encode([layer], codec)
    if codec == "positions":
        with pytest.raises(ValueError, match=r"layer 'layer': codec 'positions' needs to know .* 'weight'"):
            encode([layer], codec, {"other": torch.empty(3, 3)})


@pytest.mark.parametrize("codec", [codec for codec in LOSSY if codec != "diagonal"])
def test_a_matrix_that_cannot_be_sent_is_named(codec: str) -> None:
    parameters = {"weight": torch.empty(3, 4, 1, 2)}
    far_off = -torch.eye(8) + 0.9
    if codec in ("triangle-bfloat16", "triangle-int8"):
        with pytest.raises(CurvatureError, match=r"layer 'layer': a matrix of side . is not finite, or far from"):
            encode([LayerCurvature(BLOCK, KroneckerRight(-1e4 * far_off), 1.0)], codec, parameters)
    with pytest.raises(ValueError, match="layer 'layer': curvature without a number does not travel"):
        encode([LayerCurvature(BLOCK, KroneckerRight(torch.empty(0, 0)), 1.0)], codec, parameters)


def test_numbers_beyond_float32_are_not_sent() -> None:
    layer = LayerCurvature(BLOCK, KroneckerRight(1e39 * torch.eye(3).double()), 1.0)
    with pytest.raises(CurvatureError, match="layer 'layer': its curvature is not finite"):
        encode([layer], "triangle-float32")
    assert encode([layer], "triangle-float64")


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_positions_are_as_near_at_any_scale(scale: float) -> None:
    matrix, parameters = moments(36, 100), {"weight": torch.empty(3, 4, 3, 3)}

    def sent(matrix: Tensor) -> Tensor:
        (layer,) = pack_layers([LayerCurvature(BLOCK, KroneckerRight(matrix), 1.0)], "positions", parameters)
        return as_matrix(layer.curvature, 36)

    assert sent(matrix).trace() > 0.5 * matrix.trace()
    torch.testing.assert_close(sent(matrix * scale) / scale, sent(matrix), rtol=0.03, atol=1e-2)


def test_positions_of_inputs_that_are_always_0() -> None:
    layer = LayerCurvature(BLOCK, KroneckerRight(torch.zeros(36, 36)), 1.0)
    (sent,) = pack_layers([layer], "positions", {"weight": torch.empty(3, 4, 3, 3)})
    assert not as_matrix(sent.curvature, 36).any()


def test_a_vector_of_a_new_kind_travels_number_by_number() -> None:
    """It has no columns to be rounded in."""

    class New(LowRank):
        positive = frozenset()

    assert by_dtype(New(torch.ones(3), torch.ones(3, 1)), "int8") == {
        "floor": "values-bfloat16",
        "basis": "columns-int8",
    }


def test_what_stands_for_a_number_is_one_of_127_on_either_side() -> None:
    """Also where their unit is so small that float32 has few digits left of it."""
    part = torch.tensor([[2e-43], [-2e-43], [1e-43]])
    assert Int8Columns().pack(part)["values"].flatten().tolist() in ([127, -127, n] for n in range(30, 128))


def test_groups_are_rounded_each_in_its_own_unit() -> None:
    """A group of small curvature is as near as one of large."""
    stack = torch.stack([moments(40, 100), 1e-5 * moments(40, 100, seed=1)])
    (layer,) = pack_layers([LayerCurvature(BLOCK, KroneckerRight(stack), 1.0)], "rank-4")
    found = layer.curvature.parts()["factor"]
    alone = [as_matrix(arrived(matrix, "rank-4"), 40) for matrix in stack]
    for one, expected in zip(found, alone, strict=True):
        assert relative_error(one.double(), expected) < 1e-3


def test_float16_arrives_as_the_server_has_it() -> None:
    (layer,) = pack_layers([LayerCurvature(BLOCK, KroneckerRight(moments(20, 50).half()), 1.0)], "triangle-int8")
    (decoded,) = decode(encode([layer], "triangle-int8"), {"weight": (3, 20)})
    assert torch.equal(layer.curvature.parts()["factor"], decoded.curvature.parts()["factor"])


@pytest.mark.filterwarnings("ignore:no curvature for 1")
def test_the_budget_is_of_the_arrays_that_a_client_gets_also_for_a_single_step() -> None:
    """Buffers and copies of tied weights travel by averaging too: both ways of packing count them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 60), nn.BatchNorm1d(60), nn.Linear(60, 60), nn.Linear(60, 5))
    model[2].weight, model[2].bias = model[0].weight, model[0].bias
    arrays = model.state_dict()
    optimizer = FOOF(model, lr=0.1, damping=0.1, codec="auto-0.1")
    F.cross_entropy(model(torch.randn(30, 60)), torch.arange(30) % 5).backward()
    optimizer.step()
    measured = FOOF(model, lr=0.1, damping=0.1)
    F.cross_entropy(model(torch.randn(30, 60)), torch.arange(30) % 5).backward()
    measured.step()
    total = 0.1 * sum(value.nbytes for value in arrays.values())
    for layers in (optimizer.preconditioners(), measured.preconditioners()):
        assert 0.85 * total < len(encode(layers, "auto-0.1", arrays)) <= total


def test_what_was_sent_of_a_layer_stays_until_it_is_measured_anew() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = FOOF(model, lr=0.1, damping=0.1, codec="triangle-int8", refresh_interval=5)
    model[2].eval()
    for _ in range(2):
        optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the last layer was not measured
            model(torch.randn(8, 4)).sum().backward()
            optimizer.step()
        model[2].train()
    assert [layer.block.name for layer in optimizer.preconditioners()] == ["0", "2"]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("make", [FOOF, KFAC])
def test_a_client_that_steps_once_sends_what_it_stepped_by(codec: str, make: Callable[..., SecondOrder]) -> None:
    """W ← W − η P⁻¹g by the P that the payload says, of the layers that it has; the payload is not made twice."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    codec = codec.replace("auto-99", "auto-2.0")
    optimizer = make(model, lr=1.0, damping=0.5, codec=codec)
    loss = F.cross_entropy(model(torch.randn(20, 12).double()), torch.arange(20) % 3)
    loss.backward()
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    layers = optimizer.preconditioners()
    assert layers
    assert all((layer.packed is None) == (codec == "triangle-float64") for layer in layers)
    shapes = {key: tuple(p.shape) for key, p in before.items()}
    for layer in decode(encode(layers, codec), shapes):
        weight, bias = layer.block.parameters
        gradient = torch.cat([gradients[weight], gradients[bias][:, None]], dim=1)
        step = layer.curvature.to(torch.float64).damped(layer.damping).solve(gradient)
        moved = torch.cat([before[weight], before[bias][:, None]], dim=1) - step
        now = dict(model.named_parameters())
        found = torch.cat([now[weight], now[bias][:, None]], dim=1)
        assert relative_error(found, moved) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_precision_is_what_was_measured(dtype: torch.dtype) -> None:
    """So that P need not be packed before the step: it arrives bit for bit."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    optimizer = FOOF(model, lr=1.0, damping=0.5, codec="triangle-float32")
    F.cross_entropy(model(torch.randn(20, 12).to(dtype)).float(), torch.arange(20) % 3).backward()
    optimizer.step()
    layers = optimizer.preconditioners()
    shapes = {key: tuple(p.shape) for key, p in model.named_parameters()}
    for sent, stepped in zip(decode(encode(layers, "triangle-float32"), shapes), layers, strict=True):
        (arrived,), (measured,) = sent.curvature.parts().values(), stepped.curvature.parts().values()
        assert torch.equal(arrived, measured)


def test_sums_with_a_row_of_numbers_are_of_the_other_kind() -> None:
    row, factor = Diagonal(torch.rand(1, 6).double()), KroneckerRight(moments(6, 20).double())
    few = LowRank(torch.rand(6).double(), torch.rand(6, 1).double())
    for other in (factor, few):
        for total in (plus(row, other), plus(other, row)):
            assert total.kind == other.kind
            expected = row.to_dense(18) + other.to_dense(18)
            assert relative_error(total.to_dense(18), expected) < 1e-14


@pytest.mark.parametrize(
    "codec",
    [
        "",
        "zip",
        "rank",
        "rank-0",
        "rank-0.0",
        "rank-1.5",
        "auto-0",
        "auto-",
        "auto-0.0",
        "triangle-int4",
        "rank--1",
    ],
)
def test_a_codec_that_is_none_is_named(codec: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown codec '{codec}'; allowed: triangle-float64, .*, auto-SHARE"):
        check_codec(codec)


@pytest.mark.parametrize("codec", [*CODECS, "rank-8", "rank-.5", "auto", "auto-0.05", "auto-1", "auto-2.5"])
def test_a_codec_that_is_one(codec: str) -> None:
    check_codec(codec)


def test_two_sided_products_travel_factor_by_factor() -> None:
    generator = torch.Generator().manual_seed(2)
    product = Kronecker(spd(12, generator), spd(30, generator))
    layer, shapes = LayerCurvature(BLOCK, product, 0.1), {"weight": (12, 30)}
    parameters = {"weight": torch.empty(12, 30)}
    for codec in LOSSY:
        (found,) = decode(encode([layer], codec, parameters), shapes)
        assert isinstance(found.curvature, Kronecker)
        found.curvature.to(torch.float64).damped(1e-4).check_positive_definite()


def test_a_factor_in_8_bits_stays_definite_where_its_diagonal_rounds_to_0() -> None:
    matrix = torch.tensor([[1.0, 1 - 1e-6], [1 - 1e-6, 1.0]])
    assert float(torch.linalg.eigvalsh(as_matrix(arrived(matrix, "triangle-int8"), 6))[0]) > 1e-6


def test_an_indefinite_matrix_is_raised_in_steps_until_it_is_not() -> None:
    """Of eigenvalue −3e-4, by the first of ε · side · 10ᵏ above that, and no more."""
    lower = unit_cholesky(torch.tensor([[1.0, 1 + 3e-4], [1 + 3e-4, 1.0]])).double()
    raised = torch.finfo(torch.float32).eps * 2 * 1e4
    assert float((lower @ lower.mT)[0, 1]) == pytest.approx((1 + 3e-4) / (1 + raised), abs=1e-6)


def test_a_rank_by_its_share_holds_it_in_every_group() -> None:
    """Of a grouped convolution, of which the first group has one direction and the second ten alike."""
    groups = torch.diag_embed(torch.tensor([[9.0] + [0.0] * 39, [1.0] * 10 + [0.0] * 30]))
    parameters = {"weight": torch.empty(4, 40)}
    (layer,) = pack_layers([LayerCurvature(BLOCK, KroneckerRight(groups), 1.0)], "rank-0.9", parameters)
    assert isinstance(layer.packed, Packed)
    assert layer.packed.codecs == {"factor": "spectral-9"}


@pytest.mark.parametrize(("side", "fits"), [(1, False), (3, True), (6, True), (7, True), (8, False)])
def test_kernel_positions_need_whole_channels_and_at_most_a_bias(side: int, fits: bool) -> None:
    if fits:
        assert Positions(3).layout((side, side))
        return
    with pytest.raises(ValueError, match=f"a matrix of side {side} is not one of 3 kernel positions"):
        Positions(3).layout((side, side))
