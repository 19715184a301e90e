"""The invariants I2 to I6 of preconditioned mixing, for every curvature, every codec, whole and streaming.

With η_s = 1, the mixed model is
    I2  the weighted average, if all Pᵢ are equal
    I3  the client's model, if there is one client
    I4  θ' , if all θᵢ = θ', whatever the Pᵢ and however they were compressed
    I5  unchanged, if clients are reordered or all Pᵢ scaled by one constant
    I6  the minimiser of Σ wᵢ ‖ϑ − θᵢ‖²_Pᵢ, always
I1 is here at the level of one layer; through a whole round it is in test_least_squares.py and
test_newton_step.py.
"""

import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedpm_flwr.curvature import (
    Block,
    Curvature,
    CurvatureError,
    Identity,
    KroneckerRight,
    LayerCurvature,
    Sum,
    to_matrix,
    weighted_sum,
)
from fedpm_flwr.mixing import LayerMixer, ModelMixer, mix
from fedpm_flwr.wire import decode, encode

from .helpers import CODECS, COLUMNS, MAKERS, ROWS, random_curvature, relative_error

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
EPSILON = torch.finfo(torch.float64).eps
BLOCK = Block("layer", ("layer.weight", "layer.bias"))
ANY_NUMBER = st.integers(1, 6)
SHAPES = {"layer.weight": (ROWS, COLUMNS - 1), "layer.bias": (ROWS,)}


@dataclass
class Clients:
    theta: Tensor
    models: list[Tensor]
    curvatures: list[Curvature]
    weights: list[float]
    tolerance: float

    def mixed(self) -> Tensor:
        """θ⁺, by the equation as written; the streaming form must agree with it."""
        whole = mix(self.theta, self.models, self.curvatures, self.weights)
        mixer = LayerMixer()
        for model, curvature, weight in zip(self.models, self.curvatures, self.weights, strict=True):
            mixer.add(model - self.theta, curvature, weight)
        assert relative_error(self.theta + mixer.step(), whole) < self.tolerance
        return whole


def through_codec(curvature: Curvature, codec: str | None) -> Curvature:
    """What the server gets; the identity does not travel."""
    if codec is None or isinstance(curvature, Identity):
        return curvature
    parameters = {key: torch.empty(shape) for key, shape in SHAPES.items()}
    (received,) = decode(encode([LayerCurvature(BLOCK, curvature, 0.0)], codec, parameters), SHAPES)
    return received.curvature.to(torch.float64)


def condition_of(curvature: Curvature) -> float:
    values = torch.linalg.eigvalsh(curvature.to_dense(ROWS * COLUMNS).double())
    return float(values[-1] / values[0])


@st.composite
def clients(draw: st.DrawFn, count: st.SearchStrategy[int] = ANY_NUMBER) -> Clients:
    """Random clients of one layer, their curvatures of one or several forms and codecs, up to condition 1e6."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    number = draw(count)
    # Of one form, or of any that meet in one round.
    form = draw(st.sampled_from(sorted(MAKERS)))
    forms = (
        [form] * number if draw(st.booleans()) else [draw(st.sampled_from(sorted(MAKERS))) for _ in range(number)]
    )
    # By one codec, or by any that meet in one round.
    codec = st.sampled_from([None, *CODECS])
    codecs = [draw(codec)] * number if draw(st.booleans()) else [draw(codec) for _ in range(number)]
    # Condition numbers that a float32 triangle leaves positive definite.
    condition = 10.0 ** draw(st.integers(0, 4 if "triangle-float32" in codecs else 6))
    # What is 0 of a spectrum that was cut is lifted by the damping alone.
    exact = all(one is None or one.startswith("triangle-float") for one in codecs)
    damping = draw(st.sampled_from([0.0, 1e-3, 1.0] if exact else [1e-3, 1.0]))
    curvatures = [
        through_codec(random_curvature(form, generator, condition), one).damped(damping)
        for form, one in zip(forms, codecs, strict=True)
    ]

    def normal() -> Tensor:
        return torch.randn(ROWS, COLUMNS, dtype=torch.float64, generator=generator)

    return Clients(
        theta=normal(),
        models=[normal() for _ in range(number)],
        curvatures=curvatures,
        weights=[float(w) for w in torch.randint(1, 1000, (number,), generator=generator)],
        tolerance=max(1e-10, 10 * EPSILON * max(condition, *map(condition_of, curvatures))),
    )


@given(clients(), st.floats(0.1, 1.0), st.floats(0.1, 1.0))
def test_i1_one_step_each_is_one_step_by_the_mean_curvature(given: Clients, eta: float, server: float) -> None:
    """θᵢ = θ − η Pᵢ⁻¹gᵢ gives θ − η η_s (Σ wᵢPᵢ)⁻¹ Σ wᵢgᵢ, by dense matrices."""
    gradients = given.models  # any numbers
    given.models = [given.theta - eta * P.solve(g) for P, g in zip(given.curvatures, gradients, strict=True)]
    size = ROWS * COLUMNS
    total = torch.zeros(size, size, dtype=torch.float64)
    pull = torch.zeros(size, dtype=torch.float64)
    for w, P, g in zip(given.weights, given.curvatures, gradients, strict=True):
        total += w * P.to_dense(size).double()
        pull += w * g.flatten()
    found = mix(given.theta, given.models, given.curvatures, given.weights, server)
    step = torch.linalg.solve(total, pull).reshape(given.theta.shape)
    # A client's own solve, the mixing and the dense solve each lose what the condition takes.
    assert relative_error(found - given.theta, -eta * server * step) < 100 * given.tolerance


@given(clients())
def test_i2_equal_curvatures_give_the_weighted_average(given: Clients) -> None:
    given.curvatures = [given.curvatures[0]] * len(given.models)
    total = sum(given.weights)
    average = sum(
        (w / total * model for w, model in zip(given.weights, given.models, strict=True)),
        torch.zeros_like(given.theta),
    )
    assert relative_error(given.mixed(), average) < given.tolerance


@given(clients(st.just(1)))
def test_i3_one_client_gives_its_model(given: Clients) -> None:
    assert relative_error(given.mixed(), given.models[0]) < given.tolerance


@given(clients())
def test_i4_equal_models_give_that_model(given: Clients) -> None:
    given.models = [given.models[0]] * len(given.models)
    assert relative_error(given.mixed(), given.models[0]) < given.tolerance


@given(clients(), st.randoms(use_true_random=False), st.floats(1e-3, 1e3))
def test_i5_order_and_scale_do_not_matter(given: Clients, order: random.Random, scale: float) -> None:
    before = given.mixed()
    places = list(range(len(given.models)))
    order.shuffle(places)
    given.models = [given.models[i] for i in places]
    given.weights = [given.weights[i] for i in places]
    given.curvatures = [given.curvatures[i].scaled(scale) for i in places]
    assert relative_error(given.mixed(), before) < given.tolerance


@given(clients())
def test_i6_the_gradient_of_the_objective_vanishes(given: Clients) -> None:
    mixed = given.mixed()
    terms = [
        w * P.matmul(mixed - model)
        for w, P, model in zip(given.weights, given.curvatures, given.models, strict=True)
    ]
    # Rounding errors are relative to what is subtracted, not to the difference, which may be 0.
    sizes = (
        w * (P.matmul(mixed).norm() + P.matmul(model).norm())
        for w, P, model in zip(given.weights, given.curvatures, given.models, strict=True)
    )
    size = sum(float(s) for s in sizes)
    assert float(sum(terms, torch.zeros_like(mixed)).norm()) <= given.tolerance * size


@given(clients(), st.floats(0.1, 2.0))
def test_the_server_learning_rate_scales_the_step(given: Clients, rate: float) -> None:
    whole = given.mixed() - given.theta
    part = mix(given.theta, given.models, given.curvatures, given.weights, rate) - given.theta
    assert relative_error(part, rate * whole) < given.tolerance


def model_of(matrix: Tensor) -> dict[str, Tensor]:
    return {
        "layer.weight": matrix[:, :-1],
        "layer.bias": matrix[:, -1],
        "norm": matrix[0],
        "count": torch.tensor(7),
    }


@pytest.mark.parametrize("device", DEVICES)
@given(clients())
@settings(max_examples=50)
def test_a_whole_model_mixes_its_layers_and_averages_the_rest(device: str, given: Clients) -> None:
    mixer = ModelMixer(model_of(given.theta), device=torch.device(device))
    for model, curvature, weight in zip(given.models, given.curvatures, given.weights, strict=True):
        mixer.add(model_of(model), [LayerCurvature(BLOCK, curvature, 0.0)], weight)
    result = mixer.result()
    assert {value.device.type for value in result.values()} == {"cpu"}  # as θ
    layer = to_matrix([result["layer.weight"], result["layer.bias"]])
    assert relative_error(layer, given.mixed()) < given.tolerance
    weights = torch.tensor(given.weights, dtype=torch.float64) / sum(given.weights)
    norm = torch.stack([model[0] for model in given.models])
    assert relative_error(result["norm"], weights @ norm) < given.tolerance
    assert torch.equal(result["count"], torch.tensor(7))


@given(clients(st.integers(2, 6)), st.integers(1, 5))
def test_a_client_without_curvature_counts_with_the_mean_of_the_others(given: Clients, curved: int) -> None:
    curved = min(curved, len(given.models) - 1)
    mixer = ModelMixer(model_of(given.theta))
    for i, (model, weight) in enumerate(zip(given.models, given.weights, strict=True)):
        layers = [LayerCurvature(BLOCK, given.curvatures[i], 0.0)] if i < curved else []
        mixer.add(model_of(model), layers, weight)
    result = mixer.result()
    total = sum(given.weights[:curved])
    mean = weighted_sum([weight / total for weight in given.weights[:curved]], given.curvatures[:curved])
    given.curvatures = given.curvatures[:curved] + [mean] * (len(given.models) - curved)
    found = to_matrix([result["layer.weight"], result["layer.bias"]])
    assert relative_error(found, given.mixed()) < given.tolerance


def test_names_shapes_and_dtypes_stay_and_inputs_are_not_changed() -> None:
    theta = {"w": torch.ones(2, 2), "half": torch.ones(3, dtype=torch.float16), "n": torch.tensor([3])}
    client = {"w": torch.zeros(2, 2), "half": torch.zeros(3, dtype=torch.float16), "n": torch.tensor([5])}
    mixer = ModelMixer(theta)
    mixer.add(client, [LayerCurvature(Block("l", ("w",)), KroneckerRight(torch.eye(2)), 1.0)], 1.0)
    mixer.add(theta, [], 2.0)
    result = mixer.result()
    assert {key: (value.shape, value.dtype) for key, value in result.items()} == {
        key: (value.shape, value.dtype) for key, value in theta.items()
    }
    assert torch.allclose(result["w"], torch.full((2, 2), 2 / 3))
    assert result["n"].item() == 4  # 3 + 2/3, rounded
    assert torch.equal(theta["w"], torch.ones(2, 2))
    assert torch.equal(client["w"], torch.zeros(2, 2))


def test_the_damping_of_each_client_is_part_of_its_curvature() -> None:
    theta, moved = {"w": torch.zeros(1, 1)}, {"w": torch.ones(1, 1)}
    block = Block("l", ("w",))
    mixer = ModelMixer(theta)
    mixer.add(moved, [LayerCurvature(block, KroneckerRight(torch.ones(1, 1)), 2.0)], 1.0)  # P = 3
    mixer.add(theta, [LayerCurvature(block, KroneckerRight(torch.ones(1, 1)), 0.0)], 1.0)  # P = 1
    assert mixer.result()["w"].item() == pytest.approx(3 / 4)


def test_layers_are_told_apart_by_their_parameters_not_by_their_names() -> None:
    theta, moved = {"w": torch.zeros(1, 1)}, {"w": torch.ones(1, 1)}
    mixer = ModelMixer(theta)
    mixer.add(moved, [LayerCurvature(Block("mine", ("w",)), KroneckerRight(torch.full((1, 1), 9.0)), 0.0)], 1.0)
    mixer.add(theta, [LayerCurvature(Block("yours", ("w",)), KroneckerRight(torch.ones(1, 1)), 0.0)], 1.0)
    assert mixer.result()["w"].item() == pytest.approx(0.9)


def test_different_groupings_are_each_mixed_and_then_averaged() -> None:
    theta = {"w": torch.zeros(1, 1), "b": torch.zeros(1)}
    moved = {"w": torch.ones(1, 1), "b": torch.ones(1)}
    mixer = ModelMixer(theta)
    mixer.add(moved, [LayerCurvature(Block("l", ("w", "b")), KroneckerRight(5 * torch.eye(2)), 0.0)], 3.0)
    mixer.add(theta, [LayerCurvature(Block("l", ("w",)), KroneckerRight(torch.eye(1)), 0.0)], 1.0)
    result = mixer.result()
    assert result["w"].item() == result["b"].item() == pytest.approx(0.75)


def test_no_client_and_no_finite_step_are_errors() -> None:
    with pytest.raises(CurvatureError, match="no client"):
        ModelMixer({"w": torch.zeros(1, 1)}).result()
    with pytest.raises(CurvatureError, match="no client"):
        LayerMixer().step()
    huge = ModelMixer({"w": torch.zeros(1, 1, dtype=torch.float64)})
    curvature = KroneckerRight(torch.full((1, 1), 1e308, dtype=torch.float64))
    huge.add({"w": torch.full((1, 1), 100.0)}, [LayerCurvature(Block("l", ("w",)), curvature, 0.0)], 1.0)
    with pytest.raises(CurvatureError, match="the mixed 'w' is not finite"):
        huge.result()


def test_a_singular_sum_names_the_layer() -> None:
    mixer = ModelMixer({"w": torch.zeros(1, 2)})
    layer = LayerCurvature(Block("deep", ("w",)), KroneckerRight(torch.zeros(2, 2)), 0.0)
    mixer.add({"w": torch.ones(1, 2)}, [layer], 1.0)
    with pytest.raises(CurvatureError, match="layer 'deep'"):
        mixer.result()


def kronecker_clients(count: int) -> list[tuple[dict[str, Tensor], list[LayerCurvature], float]]:
    generator = torch.Generator().manual_seed(11)
    return [
        (
            model_of(torch.randn(ROWS, COLUMNS, dtype=torch.float64, generator=generator)),
            [LayerCurvature(BLOCK, random_curvature("kronecker", generator), 0.1)],
            1.0 + i,
        )
        for i in range(count)
    ]


def test_kronecker_factors_on_disk_give_the_same_model() -> None:
    theta = model_of(torch.zeros(ROWS, COLUMNS, dtype=torch.float64))
    results = []
    for memory in (1 << 30, 0):
        mixer = ModelMixer(theta, memory=memory)
        for client in kronecker_clients(5):
            mixer.add(*client)
        assert (mixer._spill.spilled > 0) == (memory == 0)
        results.append(mixer.result())
    assert all(torch.equal(results[0][key], results[1][key]) for key in theta)


def test_the_factored_sum_keeps_no_client_and_is_near_the_exact_one() -> None:
    theta = model_of(torch.zeros(ROWS, COLUMNS, dtype=torch.float64))
    exact, factored = ModelMixer(theta), ModelMixer(theta, memory=0, factored=True)
    for client in kronecker_clients(4):
        exact.add(*client)
        factored.add(*client)
    assert factored._spill.spilled == 0
    error = relative_error(factored.result()["layer.weight"], exact.result()["layer.weight"])
    assert 1e-3 < error < 0.5


def test_tied_parameters_stay_tied() -> None:
    theta = {key: torch.zeros(1, 2) for key in ("one", "two", "other")}
    block = Block("layer", ("one",), (("two", "one"),))
    mixer = ModelMixer(theta)
    for value, scale in ((1.0, 3.0), (0.0, 1.0)):
        client = {"one": torch.full((1, 2), value), "two": torch.full((1, 2), value), "other": torch.ones(1, 2)}
        mixer.add(client, [LayerCurvature(block, KroneckerRight(scale * torch.eye(2)), 0.0)], 1.0)
    result = mixer.result()
    assert torch.equal(result["one"], torch.full((1, 2), 0.75))
    assert torch.equal(result["two"], result["one"])
    assert torch.equal(result["other"], torch.ones(1, 2))


def test_the_factored_sum_keeps_no_client_beside_other_kinds_either() -> None:
    theta = model_of(torch.zeros(ROWS, COLUMNS, dtype=torch.float64))
    mixer = ModelMixer(theta, factored=True)
    odd = LayerCurvature(BLOCK, random_curvature("diagonal", torch.Generator().manual_seed(1)), 0.1)
    mixer.add(model_of(torch.ones(ROWS, COLUMNS, dtype=torch.float64)), [odd], 1.0)
    for client in kronecker_clients(5):
        mixer.add(*client)
    total = mixer._mixers[BLOCK]._total
    assert isinstance(total, Sum)
    assert len(total.terms) == 2
    assert all(torch.isfinite(value).all() for value in mixer.result().values())
