"""FOOF's matrix against curvlinops, and what may never enter it."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from curvlinops import KFACLinearOperator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fedpm_flwr.curvature import Block, Diagonal, KroneckerRight
from fedpm_flwr.estimators import InputCovariance


def oracle(model: nn.Module, data: list[tuple[Tensor, Tensor]], joint: bool) -> dict[str, Tensor]:
    """curvlinops' forward-only input factors: the mean over examples and positions, as ours."""
    factors = KFACLinearOperator(
        model,
        nn.MSELoss(),
        list(model.parameters()),
        data,
        fisher_type="forward-only",
        separate_weight_and_bias=not joint,
        check_deterministic=False,
    )
    factors.compute_kronecker_factors()
    found: dict[str, Tensor] = factors.state_dict()["input_covariances"]
    return found


def measure(model: nn.Module, inputs: list[Tensor]) -> dict[str, Tensor]:
    estimator = InputCovariance(model)
    model.train()
    for x in inputs:
        model(x)
    return {block.name: moment for block, moment in factors(estimator).items()}


def factors(estimator: InputCovariance) -> dict[Block, Tensor]:
    """A of each layer whose P has one."""
    found = estimator.collect()
    return {block: P.factor for block, P in found.items() if isinstance(P, KroneckerRight)}


LAYERS: dict[str, Callable[[bool], nn.Module]] = {
    "linear": lambda bias: nn.Linear(5, 3, bias=bias),
    "conv": lambda bias: nn.Conv2d(2, 3, 3, bias=bias),
    "stride": lambda bias: nn.Conv2d(2, 3, 3, stride=(2, 1), bias=bias),
    "padding": lambda bias: nn.Conv2d(2, 3, (3, 2), padding=(2, 1), bias=bias),
    "dilation": lambda bias: nn.Conv2d(2, 3, 2, dilation=(2, 3), bias=bias),
    "all": lambda bias: nn.Conv2d(2, 3, 3, stride=2, padding=2, dilation=2, bias=bias),
    "1x1": lambda bias: nn.Conv2d(2, 3, 1, bias=bias),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_equals_curvlinops(name: str, bias: bool) -> None:
    """Scaling 1: curvlinops divides by examples times positions as well, so the factors are equal."""
    torch.manual_seed(0)
    layer = LAYERS[name](bias)
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten()).double()
    shape = (5,) if name == "linear" else (2, 7, 8)
    batches = [torch.randn(n, *shape, dtype=torch.float64) for n in (4, 4)]
    with torch.no_grad():
        targets = [torch.zeros_like(model(x)) for x in batches]
    expected = oracle(model, list(zip(batches, targets, strict=True)), joint=bias)["0"]
    found = measure(model, batches)["0"]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    if bias:
        assert found[-1, -1] == 1


@pytest.mark.parametrize("groups", [1, 2])
def test_a_large_side_is_measured_strip_by_strip(groups: int) -> None:
    """In float64, against xᵀx / n as one product; 1100 is more than two strips."""
    torch.manual_seed(0)
    side = 1100
    layer = nn.Conv1d(side * groups, 2, 1, groups=groups, bias=False).double()
    x = torch.randn(3, side * groups, 2, dtype=torch.float64)
    each = x.movedim(1, -1).reshape(6, groups, side).movedim(1, 0)
    expected = each.mT @ each / 6
    found = measure(nn.Sequential(layer), [x])["0"]
    torch.testing.assert_close(found, expected if groups > 1 else expected[0], rtol=1e-12, atol=1e-12)


def test_equals_curvlinops_in_a_deep_network_with_batches_of_unequal_size() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(8, 3)
    ).double()
    batches = [torch.randn(n, 1, 4, 4, dtype=torch.float64) for n in (5, 3)]
    expected = oracle(model, [(x, torch.zeros(len(x), 3, dtype=torch.float64)) for x in batches], joint=True)
    found = measure(model, batches)
    assert set(found) == {"0", "2", "4"}
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)


Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


def patches_by_convolution(layer: Convolution, images: Tensor) -> Tensor:
    """Patches as the convolution itself sees them, [groups, positions, side]: its outputs for one-hot weights."""
    size = layer.weight[0].numel()
    make: Any = type(layer)  # the arguments of one kind each
    probe = make(
        layer.in_channels,
        layer.groups * size,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        bias=False,
        padding_mode=layer.padding_mode,
    ).double()
    one_hot = torch.eye(size, dtype=torch.float64).reshape(size, *layer.weight.shape[1:])
    probe.weight.data = one_hot.repeat(layer.groups, *[1] * (one_hot.ndim - 1))
    patches: Tensor = probe(images).detach().movedim(1, -1).reshape(-1, layer.groups, size).movedim(1, 0)
    return patches


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, "same", "valid"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_every_convolution(kind: Any, groups: int, padding: int | str, padding_mode: str) -> None:
    """Any number of dimensions, groups, dilation, and stride where the padding allows it."""
    torch.manual_seed(2)
    dimensions = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[kind]
    kernel, dilation = (3, 2, 2)[:dimensions], (1, 2, 1)[:dimensions]
    stride = 1 if padding == "same" else (2, 1, 1)[:dimensions]
    layer = kind(4, 8, kernel, stride, padding, dilation, groups, False, padding_mode).double()
    images = torch.randn(3, 4, *(6, 5, 4)[:dimensions], dtype=torch.float64)
    patches = patches_by_convolution(layer, images)
    expected = patches.mT @ patches / patches.shape[1]
    found = measure(nn.Sequential(layer), [images])["0"]
    torch.testing.assert_close(found, expected if groups > 1 else expected[0])
    alone = measure(nn.Sequential(layer), list(images))["0"]  # without a batch dimension
    torch.testing.assert_close(alone, found)


def test_the_bias_of_a_grouped_convolution_is_a_column_of_each_group() -> None:
    layer = nn.Conv1d(2, 2, 2, groups=2).double()
    signals = torch.randn(3, 2, 5, dtype=torch.float64)
    patches = patches_by_convolution(layer, signals)
    expected = torch.stack([with_ones(each).T @ with_ones(each) / each.shape[0] for each in patches])
    torch.testing.assert_close(measure(nn.Sequential(layer), [signals])["0"], expected)


def test_with_a_position_stride_only_those_positions_count_another_part_each_time() -> None:
    torch.manual_seed(3)
    conv = nn.Conv2d(2, 3, 2, stride=2, padding=1, bias=False).double()
    linear = nn.Linear(4, 1, bias=False).double()
    images = torch.randn(3, 2, 9, 8, dtype=torch.float64)
    sequences = torch.randn(3, 7, 4, dtype=torch.float64)
    on_images, on_sequences = (InputCovariance(layer, position_stride=3) for layer in (conv, linear))
    patches = patches_by_convolution(conv, images)[0].reshape(3, 5, 5, 8)
    for start in (0, 1, 2, 0):
        conv(images)
        linear(sequences)
        (moment,) = factors(on_images).values()
        chosen = patches[:, start::3, start::3].reshape(-1, 8)
        torch.testing.assert_close(moment, chosen.T @ chosen / len(chosen))
        (moment,) = factors(on_sequences).values()
        chosen = sequences[:, start::3].reshape(-1, 4)
        torch.testing.assert_close(moment, chosen.T @ chosen / len(chosen))


def test_an_embedding_counts_how_often_each_row_is_looked_up() -> None:
    layer = nn.Embedding(5, 3).double()
    characters = torch.tensor([[0, 1, 1, 4], [4, 4, 2, 1]])
    estimator = InputCovariance(layer)
    layer(characters)
    layer(characters[:1, :2])
    (P,) = estimator.collect().values()
    assert isinstance(P, Diagonal)
    one_hot = torch.nn.functional.one_hot(torch.cat([characters.flatten(), torch.tensor([0, 1])]), 5).double()
    gram = one_hot.T @ one_hot / 10
    torch.testing.assert_close(torch.diag(P.values[:, 0]), gram)


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_has_one_factor_for_its_packed_projection_or_one_of_each_input(batch_first: bool) -> None:
    attention = nn.MultiheadAttention(4, 2, batch_first=batch_first).double()
    with pytest.warns(UserWarning, match=r"no curvature for out_proj \(NonDynamicallyQuantizableLinear\)"):
        estimator = InputCovariance(attention)
    assert [block.parameters for block in estimator.blocks] == [("in_proj_weight", "in_proj_bias")]
    x, memory = torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(3, 5, 4, dtype=torch.float64)
    attention(x, x, x)
    (alike,) = factors(estimator).values()
    torch.testing.assert_close(alike, mean_of(x))
    attention(x, key=memory, value=2 * memory)
    (apart,) = factors(estimator).values()
    torch.testing.assert_close(apart, torch.stack([mean_of(x), mean_of(memory), mean_of(2 * memory)]))
    attention(x, x, x)
    attention(x, memory, memory)
    (both,) = factors(estimator).values()
    torch.testing.assert_close(both[0], mean_of(x))
    torch.testing.assert_close(both[1], (mean_of(x) + mean_of(memory)) / 2)


def test_the_packed_projections_factor_is_that_of_three_linear_layers() -> None:
    """What attention does with its packed weight is x ↦ x Wᵀ + b: the gradient by it is Σ b xᵀ of the three."""
    torch.manual_seed(5)
    attention = nn.MultiheadAttention(4, 1, batch_first=True).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    captured: list[Tensor] = []
    projected = torch.nn.functional.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    projected.register_hook(captured.append)
    q, k, v = projected.chunk(3, dim=-1)
    attended = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    attention.out_proj(attended).square().sum().backward()
    by_hand = attention.in_proj_weight.grad
    attention.zero_grad()
    attention(x, x, x)[0].square().sum().backward()
    torch.testing.assert_close(attention.in_proj_weight.grad, by_hand)
    torch.testing.assert_close(by_hand, torch.einsum("nto,nti->oi", captured[0], x))


def mean_of(x: Tensor) -> Tensor:
    rows = with_ones(x.reshape(-1, x.shape[-1]))
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize("layer", [nn.Linear(3, 2), nn.Conv1d(3, 2, 1), nn.Embedding(3, 2)])
def test_an_empty_batch_counts_nothing_and_one_example_is_measured(layer: nn.Module) -> None:
    one = torch.ones(1, 3, dtype=torch.long) if isinstance(layer, nn.Embedding) else torch.ones(1, 3, 3)
    estimator = InputCovariance(layer)
    layer(one[:0])
    assert estimator.collect() == {}
    layer(one[:0])
    layer(one)
    (P,) = estimator.collect().values()
    assert all(torch.isfinite(part).all() for part in P.parts().values())


def test_inputs_with_more_or_fewer_dimensions() -> None:
    x = torch.randn(2, 3, 4)
    found = measure(nn.Linear(4, 1, bias=False), [x])[""]
    torch.testing.assert_close(found, x.reshape(-1, 4).T @ x.reshape(-1, 4) / 6)
    image = torch.randn(1, 5, 5)
    alone = measure(nn.Conv2d(1, 1, 3), [image])[""]
    torch.testing.assert_close(alone, measure(nn.Conv2d(1, 1, 3), [image[None]])[""])


def test_a_module_called_twice_counts_both_inputs() -> None:
    layer = nn.Linear(3, 3, bias=False)
    first, second = torch.randn(4, 3), torch.randn(2, 3)
    estimator = InputCovariance(layer)
    layer(first)
    layer(second)
    both = torch.cat([first, second])
    (moment,) = factors(estimator).values()
    torch.testing.assert_close(moment, both.T @ both / 6)
    assert estimator.collect() == {}


class TestWhatNeverEnters:
    @pytest.fixture
    def model(self) -> nn.Sequential:
        return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))

    def test_no_grad_and_inference_mode(self, model: nn.Sequential) -> None:
        estimator = InputCovariance(model)
        with torch.no_grad():
            model(torch.randn(2, 3))
        with torch.inference_mode():
            model(torch.randn(2, 3))
        assert estimator.collect() == {}

    def test_evaluation_mode(self, model: nn.Sequential) -> None:
        estimator = InputCovariance(model)
        model.eval()
        model(torch.randn(2, 3))
        assert estimator.collect() == {}

    def test_forwards_while_not_recording(self, model: nn.Sequential) -> None:
        estimator = InputCovariance(model)
        estimator.recording = []
        model(torch.randn(2, 3))
        assert estimator.collect() == {}

    def test_recomputation_by_checkpointing(self, model: nn.Sequential) -> None:
        x = torch.randn(4, 3)
        estimator = InputCovariance(model)
        calls = []
        model[0].register_forward_pre_hook(lambda *_: calls.append(1))
        checkpoint(model, x, use_reentrant=False).sum().backward()
        assert len(calls) == 2, "the checkpoint must have run the layer twice"
        assert estimator._moments[estimator.blocks[0]].counts == [4]
        torch.testing.assert_close(factors(estimator)[estimator.blocks[0]], with_ones(x).T @ with_ones(x) / 4)

    def test_a_layer_in_a_reentrant_checkpoint(self, model: nn.Sequential) -> None:
        estimator = InputCovariance(model)
        checkpoint(model, torch.randn(4, 3, requires_grad=True), use_reentrant=True).sum().backward()
        assert estimator.collect() == {}

    def test_after_detach(self, model: nn.Sequential) -> None:
        estimator = InputCovariance(model)
        estimator.detach()
        model(torch.randn(2, 3))
        assert estimator.collect() == {}


def test_what_cannot_be_measured_is_named_once() -> None:
    tied = nn.Linear(4, 4)
    model = nn.ModuleDict(
        {
            "norm": nn.GroupNorm(1, 4),
            "transposed": nn.ConvTranspose2d(4, 4, 3),
            "wide": nn.Linear(20, 2),
            "good": nn.Linear(4, 2),
            "tied": tied,
            "twin": nn.Linear(4, 4),
            "lookup": nn.Embedding(4, 2, sparse=True),
        }
    )
    model["twin"].weight = tied.weight
    with pytest.warns(UserWarning, match="no curvature for") as caught:
        estimator = InputCovariance(model, max_side=15)
    assert len(caught) == 1
    for name in (
        "norm (GroupNorm)",
        "transposed (ConvTranspose2d",
        "wide (21 inputs",
        "tied (shared",
        "twin (shared",
        "lookup (sparse",
    ):
        assert name in str(caught[0].message)
    assert [block.name for block in estimator.blocks] == ["good"]


def test_frozen_parameters_belong_to_no_block() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    model[1].bias.requires_grad_(False)
    estimator = InputCovariance(model)
    assert [block.parameters for block in estimator.blocks] == [("1.weight",), ("2.weight", "2.bias")]
    model(torch.randn(2, 3))
    assert [len(moment) for moment in factors(estimator).values()] == [3, 4]


def with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], dim=1)


def test_factors_stay_float32_under_autocast() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    estimator = InputCovariance(model)
    x = torch.randn(8, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model[0](x)
        assert hidden.dtype == torch.bfloat16
        estimator.collect()
        model(x)
    first, second = factors(estimator).values()
    assert first.dtype == second.dtype == torch.float32
    torch.testing.assert_close(first, with_ones(x).T @ with_ones(x) / 8)
    torch.testing.assert_close(second, with_ones(hidden.float()).T @ with_ones(hidden.float()) / 8)


def test_a_layer_called_by_keyword() -> None:
    layer = nn.Linear(2, 1)
    estimator = InputCovariance(layer)
    x = torch.randn(3, 2)
    layer(input=x)
    (moment,) = factors(estimator).values()
    torch.testing.assert_close(moment, with_ones(x).T @ with_ones(x) / 3)


def test_copies_of_the_model_are_not_measured_and_the_model_can_be_saved() -> None:
    model = nn.Sequential(nn.Linear(2, 1))
    estimator = InputCovariance(model)
    copy.deepcopy(model)(torch.randn(3, 2))
    pickle.loads(pickle.dumps(model))(torch.randn(3, 2))
    assert estimator.collect() == {}
    model(torch.randn(3, 2))
    assert len(estimator.collect()) == 1


def test_hooks_go_with_the_estimator() -> None:
    layer = nn.Linear(2, 1)
    for _ in range(3):
        estimator = InputCovariance(layer)
    assert len(layer._forward_pre_hooks) == 1
    del estimator
    assert len(layer._forward_pre_hooks) == 0


def test_a_module_under_two_names_is_one_layer_with_copies() -> None:
    model = nn.Module()
    model.one = nn.Linear(2, 2)
    model.two = model.one
    (block,) = InputCovariance(model).blocks
    assert block.parameters == ("one.weight", "one.bias")
    assert block.copies == (("two.bias", "one.bias"), ("two.weight", "one.weight"))


def test_tied_layers_are_one_layer_that_counts_the_inputs_of_both() -> None:
    one, two = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    two.weight = one.weight
    model = nn.Sequential(one, nn.Tanh(), two)
    estimator = InputCovariance(model)
    assert [(block.parameters, block.copies) for block in estimator.blocks] == [
        (("0.weight",), (("2.weight", "0.weight"),))
    ]
    x = torch.randn(5, 3)
    hidden = torch.tanh(one(x)).detach()
    estimator.collect()
    model(x)
    (moment,) = factors(estimator).values()
    torch.testing.assert_close(moment, (x.T @ x + hidden.T @ hidden) / 10)


def test_an_embedding_tied_to_the_output_layer_is_left_out() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    with pytest.warns(UserWarning, match=r"0 \(shared parameter\), 1 \(shared parameter\)"):
        assert InputCovariance(model).blocks == []


def test_a_bias_shared_by_layers_with_their_own_weights_leaves_them_out() -> None:
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    two.bias = one.bias
    with pytest.warns(UserWarning, match="shared parameter"):
        assert InputCovariance(nn.Sequential(one, two)).blocks == []
