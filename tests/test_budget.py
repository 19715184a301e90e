"""What ``codec="auto"`` buys, and in which order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedpm_flwr.curvature import Block, Curvature, Dense, Diagonal, Kronecker, KroneckerRight, LayerCurvature
from fedpm_flwr.curvature.linalg import leading
from fedpm_flwr.wire import budget, encode, low_rank
from fedpm_flwr.wire.budget import Offer
from fedpm_flwr.wire.compression import bytes_of_rank
from fedpm_flwr.wire.packed import Packed


def layer_of(name: str, values: list[float], damping: float = 1.0) -> LayerCurvature:
    return LayerCurvature(
        Block(name, (f"{name}.weight",)), KroneckerRight(torch.diag(torch.tensor(values))), damping
    )


def ranks(sent: list[Packed | None]) -> list[int]:
    """Eigenvectors of each layer; 0: it is not sent, or as a matrix."""
    return [one.shapes["basis"][1] if one is not None and "basis" in one.shapes else 0 for one in sent]


def test_an_eigenvector_buys_the_square_of_the_relative_error_without_it() -> None:
    matrix = torch.diag(torch.tensor([4.0, 1.0, 0.5, 0.5, 0.5, 0.5]))
    expected = [(mu / (mu + 2)) ** 2 for mu in (4.0, 1.0, 0.5, 0.5, 0.5, 0.5)]
    shares = [gain / sum(expected) for gain in expected]
    # Known are as many as there are bytes for; the others count as their mean, which is what they are here.
    assert budget._gains(matrix, 2.0, 6 * 6) == pytest.approx(shares)
    assert budget._gains(matrix, 2.0, 3 * 6) == pytest.approx(shares[:3])
    # The first counts as half of all, and its share of the other half.
    first, second, *_ = budget._offers(layer_of("l", [4.0, 1.0, 0.5, 0.5, 0.5, 0.5], 2.0), 36)
    assert (first.gain, second.gain) == pytest.approx((0.5 + shares[0] / 2, 0.5 + (shares[0] + shares[1]) / 2))


def test_damping_counts_beside_the_product_of_both_factors() -> None:
    """λ is in P's unit: of a factor it is λ over the other's mean eigenvalue, so that scales cancel."""

    def spent(scale: float) -> list[float]:
        left = torch.diag(torch.tensor([1.0, 0.5, 0.25, 0.1, 0.1, 0.1, 0.1, 0.1])) * scale
        right = torch.diag(torch.linspace(3.0, 0.01, 200)) / scale
        layer = LayerCurvature(Block("l", ("w",)), Kronecker(left, right), 0.01)
        return [number for offer in budget._offers(layer, 5000) for number in (offer.bytes, offer.gain)]

    assert spent(1.0) == pytest.approx(spent(1000.0), rel=1e-3)


def test_what_buys_most_for_its_bytes_comes_first_and_the_last_byte_is_spent() -> None:
    def offers(*given: tuple[int, float]) -> list[Offer]:
        return [Offer(cost, gain, lambda: Packed("x", {}, {}, {})) for cost, gain in given]

    # By gain alone the first would win; by gain for its bytes the second does, and both do not fit.
    by_layer = {"dear": offers((100, 1.0)), "cheap": offers((10, 0.5))}
    layers = [layer_of(name, [1.0, 1.0]) for name in by_layer]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "_offers", lambda layer, _: by_layer[layer.block.name])
        assert [one is not None for one in budget.spend(layers, 100)] == [False, True]
        assert [one is not None for one in budget.spend(layers, 110)] == [True, True]
        assert [one is not None for one in budget.spend(layers, 109)] == [False, True]


def test_every_layer_has_its_first_eigenvector_before_any_has_its_tenth() -> None:
    steep = layer_of("steep", [100.0] * 12 + [0.0] * 188)
    flat = layer_of("flat", [0.02] * 200)
    one_each = sum(offers[0].bytes for offers in (budget._offers(one, 5000) for one in (steep, flat)))
    found = ranks(
        budget.spend([steep, flat], one_each + 7 * (bytes_of_rank(2, (200, 200)) - bytes_of_rank(1, (200, 200))))
    )
    assert found[1] >= 1
    assert found[0] >= 4


@pytest.mark.parametrize("sides", [(500, 400), (400, 500), (10, 600)])
def test_two_factors_have_their_first_eigenvectors_before_either_has_many(sides: tuple[int, int]) -> None:
    """Whatever their spectra: a layer is sent as soon as its cheapest form can be paid."""
    generator = torch.Generator().manual_seed(0)

    def flat(side: int) -> Tensor:
        x = torch.randn(4 * side, side, generator=generator)
        return x.T @ x / (4 * side)

    layer = LayerCurvature(Block("l", ("w",)), Kronecker(flat(sides[0]), flat(sides[1])), 0.1)
    cheapest = sum(bytes_of_rank(1, (side, side)) for side in sides) + 800
    for allowed in (cheapest, 3 * cheapest, 20 * cheapest):
        (sent,) = budget.spend([layer], allowed)
        assert sent is not None


def test_of_two_factors_with_one_spectrum_the_cheaper_vectors_come_first() -> None:
    spectrum = torch.tensor([1.0, 0.9, 0.8])
    short, long = (torch.diag(torch.cat([spectrum, torch.zeros(side - 3)])) for side in (30, 300))
    layer = LayerCurvature(Block("l", ("w",)), Kronecker(long, short), 0.0)
    made = [offer.make().codecs for offer in budget._offers(layer, 30000)[:3]]
    assert [(codecs["left"], codecs["right"]) for codecs in made] == [
        ("spectral-1", "spectral-1"),
        ("spectral-1", "spectral-2"),
        ("spectral-1", "spectral-3"),
    ]


NAMES = st.text(max_size=12)


@given(data=st.data())
@settings(max_examples=150)
def test_a_budget_is_never_exceeded(data: st.DataObject) -> None:
    """By odd names, many parameters, stacks, long numbers: the header counts too."""
    layers, parameters = [], dict[str, Tensor]()
    for index in range(data.draw(st.integers(1, 4))):
        side, rows, groups = (data.draw(st.integers(1, most)) for most in (40, 12, 3))
        scale = data.draw(st.sampled_from([1e-7, 1.0, 123456.789]))
        x = torch.randn(groups, 2 * side, side, generator=torch.Generator().manual_seed(index))
        right = scale * (x.mT @ x)[0 if groups == 1 else slice(None)]
        left = torch.eye(rows).expand(*right.shape[:-2], rows, rows).contiguous()
        name = f"{index}{data.draw(NAMES)}"
        keys: tuple[str, ...] = (name,)
        shapes: list[tuple[int, ...]] = [(groups * rows, side)]
        kind = data.draw(st.sampled_from(["right", "kronecker", "dense", "diagonal"]))
        curvature: Curvature = KroneckerRight(right)
        if kind == "kronecker":
            curvature = Kronecker(left, right)
        elif kind == "dense":
            keys, shapes = tuple(f"{name}.{i}" for i in range(side)), [(1,)] * side
            curvature = Dense(x[0].T @ x[0])
        elif kind == "diagonal":
            curvature = Diagonal(x[0, :rows].square() if len(x[0]) >= rows else x[0].square())
            shapes = [tuple(curvature.values.shape)]
        parameters |= {key: torch.empty(shape, device="meta") for key, shape in zip(keys, shapes, strict=True)}
        damping = data.draw(st.floats(0, 10))
        layers.append(LayerCurvature(Block(data.draw(NAMES), keys), curvature, damping))
    total = sum(p.numel() * 4 for p in parameters.values())
    share = data.draw(st.integers(1, 300)) / 100
    empty = len(encode([], "auto-1", parameters))
    assert len(encode(layers, f"auto-{share}", parameters)) <= max(share * total, empty)


def test_names_are_paid_for() -> None:
    short, long = layer_of("l", [1.0] * 50), layer_of("l" * 500, [1.0] * 50)
    assert budget._offers(long, 999)[0].bytes - budget._offers(short, 999)[0].bytes >= 2 * 499


def test_the_sign_of_an_eigenvector_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 12, generator=generator)
    before = low_rank.Spectral(4).pack(x.T @ x)

    def turned(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        values, vectors = leading(matrix, rank)
        return values, -vectors

    monkeypatch.setattr(low_rank, "leading", turned)
    after = low_rank.Spectral(4).pack(x.T @ x)
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_budget_is_of_the_parameters_own_bytes(dtype: torch.dtype) -> None:
    parameters = {"w": torch.empty(50, 200, dtype=dtype)}
    layer = LayerCurvature(Block("l", ("w",)), KroneckerRight(torch.diag(torch.linspace(9.0, 0.1, 200))), 0.1)
    allowed = 0.1 * 50 * 200 * dtype.itemsize
    assert 0.9 * allowed < len(encode([layer], "auto-0.1", parameters)) <= allowed
