"""Whatever curvature a client sends, of whichever kind: it is left out, or the round of all goes on."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedpm_flwr import replies
from fedpm_flwr.curvature import (
    Block,
    Curvature,
    Dense,
    Diagonal,
    Kronecker,
    KroneckerRight,
    LayerCurvature,
    LowRank,
)
from fedpm_flwr.mixing import ModelMixer
from fedpm_flwr.wire import decode, encode

from .helpers import relative_error

ROWS, COLUMNS = 6, 4
THETA = {"w": torch.zeros(ROWS, COLUMNS)}
BLOCK = Block("layer", ("w",))
_MODEST = [1e-30, 1e-9, 1e-3, 1.0, 1e6, 1e18]
SIZES = st.sampled_from([*_MODEST, 1e-205, 1e49, 1e150, 1e197])


@st.composite
def symmetric(
    draw: st.DrawFn, side: int, groups: int | None = None, sizes: st.SearchStrategy[float] = SIZES
) -> Tensor:
    """Semidefinite of any rank and size; sometimes not quite symmetric-looking numbers at all."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    rank = draw(st.integers(0, side))
    half = torch.randn(groups or 1, side, max(rank, 1), generator=generator).double()
    matrix = half @ half.mT * (draw(sizes) if rank else 0.0)
    if draw(st.integers(0, 9)) == 0:
        matrix = matrix - draw(sizes) * torch.eye(side).double()
    return matrix if groups else matrix[0]


@st.composite
def anything(draw: st.DrawFn) -> Curvature:
    kind = draw(st.sampled_from(["right", "kronecker", "diagonal", "low-rank", "dense"]))
    groups = draw(st.sampled_from([None, 1, 2, 3, 6]))
    if kind == "right":
        return KroneckerRight(draw(symmetric(COLUMNS, groups)))
    if kind == "kronecker":
        return Kronecker(draw(symmetric(ROWS // (groups or 1), groups)), draw(symmetric(COLUMNS, groups)))
    if kind == "diagonal":
        shape = draw(st.sampled_from([(1, 1), (ROWS, 1), (1, COLUMNS), (ROWS, COLUMNS)]))
        return Diagonal(torch.rand(shape).double() * draw(SIZES))
    if kind == "low-rank":
        rank = draw(st.integers(1, COLUMNS))
        floor = torch.rand(COLUMNS).double() * draw(SIZES)
        return LowRank(floor, torch.randn(COLUMNS, rank).double() * draw(SIZES) ** 0.5)
    return Dense(draw(symmetric(ROWS * COLUMNS)))


def as_received(curvature: Curvature, damping: float, codec: str = "triangle-float32") -> list[LayerCurvature]:
    """What the server reads, and has checked.

    Raises:
        ValueError: it is refused, for whatever reason.
    """
    payload = encode([LayerCurvature(BLOCK, curvature, damping)], codec)
    layers = decode(payload, {"w": (ROWS, COLUMNS)})
    for layer in layers:
        replies._check_layer(layer, (0.0, 1e6))
    return layers


DAMPINGS = st.sampled_from([0.0, 1e-6, 0.1, 1e3])


@given(
    st.lists(st.tuples(anything(), DAMPINGS), min_size=1, max_size=5),
    st.booleans(),
    st.sampled_from(["triangle-float32", "triangle-float64"]),
)
@settings(max_examples=400)
def test_a_round_of_any_kinds_has_a_result(
    clients: list[tuple[Curvature, float]], factored: bool, codec: str
) -> None:
    mixer = ModelMixer(THETA, factored=factored)
    honest = LayerCurvature(BLOCK, KroneckerRight(torch.eye(COLUMNS)), 0.1)
    mixer.add({"w": torch.ones(ROWS, COLUMNS)}, [honest], 1.0)
    accepted = 0
    for place, (curvature, damping) in enumerate(clients):
        try:
            layers = as_received(curvature, damping, codec)
        except ValueError:
            continue
        accepted += 1
        mixer.add({"w": torch.full((ROWS, COLUMNS), 0.1 * place)}, layers, 1.0)
    assume(accepted)
    assert torch.isfinite(mixer.result()["w"]).all()


@pytest.mark.parametrize("size", [1e6, 1e12])
def test_means_of_factors_that_rounding_made_indefinite_have_a_result_beside_other_kinds(size: float) -> None:
    """Each client's product is 0, and so definite when damped; the product of their means is not."""

    def nearly_semidefinite(side: int) -> Tensor:
        values = torch.full((side,), -1e-7).double()
        values[0] = 1.0
        half = torch.randn(side, side, generator=torch.Generator().manual_seed(side)).double()
        basis: Tensor = torch.linalg.qr(half).Q
        return size * (basis * values) @ basis.mT

    mixer = ModelMixer(THETA, factored=True)
    honest = LayerCurvature(BLOCK, KroneckerRight(torch.eye(COLUMNS)), 0.1)
    mixer.add({"w": torch.ones(ROWS, COLUMNS)}, [honest], 1.0)
    for left, right in (
        (torch.zeros(ROWS, ROWS).double(), nearly_semidefinite(COLUMNS)),
        (nearly_semidefinite(ROWS), torch.zeros(COLUMNS, COLUMNS).double()),
    ):
        layers = as_received(Kronecker(left, right), 1e-6)
        mixer.add({"w": torch.full((ROWS, COLUMNS), 0.1)}, layers, 1.0)
    assert torch.isfinite(mixer.result()["w"]).all()


def test_likewise_where_a_dense_matrix_holds_the_means_from_then_on() -> None:
    mixer = ModelMixer(THETA, factored=True)
    values = torch.full((ROWS,), -9e-5).double()
    values[0] = 1.0
    for curvature in (
        Kronecker(torch.eye(ROWS), torch.eye(COLUMNS)),
        Kronecker(1e6 * values.diag(), torch.zeros(COLUMNS, COLUMNS).double()),
        Dense(torch.eye(ROWS * COLUMNS)),
    ):
        mixer.add({"w": torch.ones(ROWS, COLUMNS)}, as_received(curvature, 0.1), 1.0)
    assert torch.isfinite(mixer.result()["w"]).all()


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("size", [1e49, 1e150, 1e300])
def test_a_huge_factor_beside_one_of_nothing_fails_no_round(size: float, factored: bool) -> None:
    """Their product is 0; their means with an honest client's factors are not."""
    mixer = ModelMixer(THETA, factored=factored)
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        left, right = (torch.randn(side, side, generator=generator).double() for side in (ROWS, COLUMNS))
        honest = as_received(Kronecker(left @ left.T, right @ right.T), 0.1)
        mixer.add({"w": torch.full((ROWS, COLUMNS), float(seed))}, honest, 1.0)
    huge = Kronecker(torch.zeros(ROWS, ROWS).double(), size * torch.eye(COLUMNS).double())
    if size > 1e50:
        with pytest.raises(ValueError, match=r"a Kronecker factor of eigenvalue .*; allowed: below 1e\+50"):
            as_received(huge, 0.1, "triangle-float64")
    else:
        mixer.add({"w": torch.zeros(ROWS, COLUMNS)}, as_received(huge, 0.1, "triangle-float64"), 1.0)
    assert torch.isfinite(mixer.result()["w"]).all()


@given(
    symmetric(ROWS, sizes=st.sampled_from(_MODEST)),
    symmetric(COLUMNS, sizes=st.sampled_from(_MODEST)),
    st.floats(-18, 18),
)
@settings(max_examples=50)
def test_however_one_client_splits_its_product_the_others_get_the_same_model(
    left: Tensor, right: Tensor, exponent: float
) -> None:
    assume(0 < float(left.trace() * right.trace()) < 1e12)
    results = []
    for scale in (1.0, 10.0**exponent):
        mixer = ModelMixer(THETA)
        generator = torch.Generator().manual_seed(1)
        for place in range(3):
            half = torch.randn(2, COLUMNS, COLUMNS, generator=generator).double()
            other = torch.randn(ROWS, ROWS, generator=generator).double()
            honest = Kronecker(other @ other.T, half[0] @ half[0].T)
            model = {"w": torch.full((ROWS, COLUMNS), 1.0 + place)}
            mixer.add(model, [LayerCurvature(BLOCK, honest, 0.1)], 1.0)
        odd = LayerCurvature(BLOCK, Kronecker(left * scale, right / scale), 1.0)
        try:
            odd.curvature.damped(1.0).check_positive_definite()
        except ValueError:
            assume(False)
        mixer.add({"w": torch.zeros(ROWS, COLUMNS)}, [odd], 1.0)
        results.append(mixer.result()["w"])
    assert relative_error(results[1], results[0]) < 1e-5
