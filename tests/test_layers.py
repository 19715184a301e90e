"""What a layer's input is and which layers are found; and the hooks of every estimator that has some."""

import copy
import gc
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fedpm_flwr.curvature import Curvature, to_matrix
from fedpm_flwr.estimators import GaussNewtonBartlett, InputCovariance, KroneckerFactors
from fedpm_flwr.estimators.kfac import _outputs
from fedpm_flwr.estimators.layers import find_layers, rows_of
from fedpm_flwr.optim import FOOF

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(3, 4), (5, 3)),
    "linear, one example": (lambda: nn.Linear(3, 4), (3,)),
    "linear, sequences": (lambda: nn.Linear(3, 4, bias=False), (2, 5, 3)),
    "linear, images": (lambda: nn.Linear(3, 4), (2, 3, 2, 3)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), (4, 2, 7)),
    "conv1d, unbatched": (lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="replicate"), (2, 7)),
    "conv2d, same": (lambda: nn.Conv2d(2, 3, (2, 3), padding="same", dilation=(2, 1)), (2, 2, 5, 6)),
    "conv2d, reflect": (lambda: nn.Conv2d(2, 3, 3, (1, 2), (2, 1), padding_mode="reflect"), (2, 2, 5, 6)),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, 2, stride=2, groups=2, bias=False), (3, 4, 5, 4)),
    "conv2d, unbatched depthwise": (lambda: nn.Conv2d(3, 6, 2, groups=3), (3, 4, 4)),
    "conv3d": (lambda: nn.Conv3d(2, 2, 2, padding=1, padding_mode="circular"), (2, 2, 3, 2, 3)),
    "conv3d, groups": (lambda: nn.Conv3d(2, 4, (1, 2, 2), groups=2, dilation=(1, 1, 2)), (2, 2, 2, 3, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_gradient_by_the_weights_is_the_sum_of_outer_products_with_the_inputs(name: str) -> None:
    """∂/∂Δ = Σ b xᵀ, with torch's own gradient by the weights as the oracle: a wrong x, or order, would differ."""
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = make().double()
    images = torch.randn(shape, dtype=torch.float64)
    output = layer(images)
    gradient = torch.randn_like(output)
    output.backward(gradient)
    x, b = rows_of(layer, images), _outputs(layer, gradient)
    if getattr(layer, "bias", None) is not None:
        x = F.pad(x, (0, 1), value=1.0)
    expected = to_matrix([p.grad for p in layer.parameters() if p.grad is not None])
    torch.testing.assert_close((b.mT @ x).reshape(expected.shape), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch_first", [True, False, None])
def test_a_position_stride_is_along_the_sequence_of_attention(batch_first: bool | None) -> None:
    """None: a sequence without a batch."""
    torch.manual_seed(1)
    attention = nn.MultiheadAttention(4, 2, batch_first=bool(batch_first)).double()
    sequences = torch.randn(7, 3, 4, dtype=torch.float64)  # [positions, batch, n]
    x = {True: sequences.movedim(0, 1), False: sequences, None: sequences[:, 0]}[batch_first]
    with pytest.warns(UserWarning, match="no curvature for out_proj"):
        estimator = InputCovariance(attention, position_stride=3)
    for start in (0, 1, 2, 0):
        attention(x, x, x)
        (P,) = estimator.collect().values()
        seen = sequences[start::3] if batch_first is not None else sequences[start::3, 0]
        rows = F.pad(seen.reshape(-1, 4), (0, 1), value=1.0)
        torch.testing.assert_close(P.parts()["factor"], rows.T @ rows / len(rows), rtol=1e-12, atol=1e-14)


def test_of_empty_sequences_no_position_is_taken() -> None:
    layer = nn.Linear(3, 2)
    estimator = InputCovariance(layer, position_stride=2)
    layer(torch.zeros(2, 0, 3))
    assert estimator.collect() == {}


def found(model: nn.Module, **options: Any) -> tuple[list[str], list[str]]:
    layers, left_out = find_layers(model, set(model.parameters()), 100, **options)
    return [layer.block.name for layer in layers], left_out


def test_convolutions_that_share_a_weight_but_not_its_groups_are_left_out() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 1, groups=2, bias=False), nn.Conv1d(2, 4, 1, bias=False))
    model[1].weight = model[0].weight
    assert found(model) == ([], ["0 (shared parameter)", "1 (shared parameter)"])
    model[1] = nn.Conv1d(4, 4, 1, stride=2, groups=2, bias=False)
    model[1].weight = model[0].weight
    assert found(model) == (["0"], [])


def test_layers_with_too_many_outputs_are_left_out_groups_one_by_one() -> None:
    model = nn.Sequential(nn.Linear(2, 7), nn.Conv1d(2, 7, 1), nn.Conv1d(2, 12, 1, groups=2), nn.Linear(5, 6))
    assert found(model) == (["0", "1", "2", "3"], [])
    assert found(model, max_outputs=6) == (
        ["2", "3"],
        ["0 (7 outputs, more than 6)", "1 (7 outputs, more than 6)"],
    )
    with pytest.warns(UserWarning, match=r"no curvature for 0 \(7 outputs, more than 6\), 1 .*: averaged"):
        estimator = KroneckerFactors(model, max_side=6)
    assert [block.name for block in estimator.blocks] == ["2", "3"]


def test_a_layer_whose_weight_is_made_of_other_parameters_is_left_out() -> None:
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    assert found(nn.Sequential(normed, nn.Linear(2, 2)))[0] == ["1"]


def test_attention_with_keys_of_another_size_has_no_packed_projection_and_is_left_out() -> None:
    names, left_out = found(nn.ModuleDict({"a": nn.MultiheadAttention(4, 2, kdim=3)}))
    assert names == []
    assert left_out == ["a (MultiheadAttention)", "a.out_proj (NonDynamicallyQuantizableLinear)"]


Estimator = InputCovariance | KroneckerFactors | GaussNewtonBartlett
ESTIMATORS: dict[str, Callable[[nn.Module], Estimator]] = {
    "inputs": InputCovariance,
    "exact": lambda model: KroneckerFactors(model, "exact"),
    "sampled": lambda model: KroneckerFactors(model, "sampled"),
    "empirical": lambda model: KroneckerFactors(model, "empirical"),
    "bartlett": GaussNewtonBartlett,
}
every_estimator = pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS)


class Network(nn.Module):
    """With an activation in place, and a part that can be checkpointed."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.body = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.Tanh())
        self.head = nn.Linear(4, 3)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)
        logits: Tensor = self.head(hidden)
        return logits


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 3, dtype=dtype, generator=generator)
    return x, torch.randint(0, 3, (6,), generator=generator)


def step(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """The gradients of the mean loss."""
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def numbers(estimator: Estimator) -> list[Tensor]:
    return parts(list(estimator.collect().values()))


def parts(curvatures: list[Curvature]) -> list[Tensor]:
    return [part for P in curvatures for part in P.parts().values()]


def expected_of(make: Callable[[nn.Module], Estimator]) -> tuple[list[Tensor], list[Tensor]]:
    """P and the gradients of a network that nothing is done to."""
    model = Network().double()
    gradients = step(model, *data())
    estimator = make(model)
    torch.testing.assert_close(step(model, *data()), gradients, rtol=0, atol=0)
    return numbers(estimator), gradients


@every_estimator
def test_nothing_is_measured_without_gradients_or_in_evaluation_mode(
    make: Callable[[nn.Module], Estimator],
) -> None:
    expected, _ = expected_of(make)
    model = Network().double()
    estimator = make(model)
    x, y = data()
    with torch.no_grad():
        model(2 * x)
    with torch.inference_mode():
        model(2 * x)
    model.eval()
    step(model, 2 * x, y)
    model.train()
    assert estimator.collect() == {}
    step(model, x, y)
    torch.testing.assert_close(numbers(estimator), expected)


@every_estimator
def test_recomputation_by_a_checkpoint_is_not_measured(make: Callable[[nn.Module], Estimator]) -> None:
    expected, gradients = expected_of(make)
    model = Network(checkpointed=True).double()
    calls: list[int] = []
    model.body[0].register_forward_pre_hook(lambda *_: calls.append(1))
    estimator = make(model)
    torch.testing.assert_close(step(model, *data()), gradients)
    assert len(calls) >= 2, "the checkpoint must have run the layer again"
    torch.testing.assert_close(numbers(estimator), expected)


@every_estimator
def test_copies_are_not_measured_and_train_as_the_model_does(make: Callable[[nn.Module], Estimator]) -> None:
    expected, gradients = expected_of(make)
    model = Network().double()
    estimator = make(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(step(twin, *data()), gradients)
    assert estimator.collect() == {}
    step(model, *data())
    torch.testing.assert_close(numbers(estimator), expected)


@every_estimator
def test_hooks_go_with_the_estimator_without_garbage_collection(make: Callable[[nn.Module], Estimator]) -> None:
    model = Network().double()
    gc.disable()
    try:
        estimator = make(model)
        step(model, *data())
        assert hooks(model)
        del estimator
        assert not hooks(model)
    finally:
        gc.enable()
    estimator = make(model)
    estimator.detach()
    assert not hooks(model)
    step(model, *data())
    assert estimator.collect() == {}


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("made_on", ["plain", "compiled"])
@every_estimator
def test_a_compiled_model_is_measured_as_a_plain_one(make: Callable[[nn.Module], Estimator], made_on: str) -> None:
    expected, gradients = expected_of(make)
    torch.compiler.reset()
    model = Network().double()
    compiled = torch.compile(model, backend="eager")
    assert isinstance(compiled, nn.Module)
    estimator = make(compiled if made_on == "compiled" else model)
    assert not any("_orig_mod" in key for block in estimator.blocks for key in block.parameters)
    torch.testing.assert_close(step(compiled, *data()), gradients)
    torch.testing.assert_close(numbers(estimator), expected)


@every_estimator
def test_measuring_compiles_nothing_anew(make: Callable[[nn.Module], Estimator]) -> None:
    torch.compiler.reset()
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(1)
        return graph.forward

    model = Network().double()
    estimator = make(model)
    compiled = torch.compile(model, backend=backend)
    assert isinstance(compiled, nn.Module)
    counts = []
    for recording in (estimator.blocks, [], estimator.blocks, estimator.blocks[1:], estimator.blocks):
        estimator.recording = recording
        step(compiled, *data())
        estimator.collect()
        step(compiled, *data())
        counts.append(len(graphs))
    assert counts[0] == counts[-1]


def test_self_attention_in_a_compiled_model_has_one_factor() -> None:
    torch.compiler.reset()
    layer = nn.TransformerEncoderLayer(4, 2, 4, 0.0, batch_first=True).double()
    with pytest.warns(UserWarning, match="no curvature for"):
        estimator = InputCovariance(layer)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    shapes = []
    for model in (layer, torch.compile(layer, backend="eager")):
        model(x)
        shapes.append({block.name: P.parts()["factor"] for block, P in estimator.collect().items()})
    assert shapes[0]["self_attn"].shape == (5, 5)
    torch.testing.assert_close(shapes[1], shapes[0])


@every_estimator
def test_under_autocast_curvature_stays_float32(make: Callable[[nn.Module], Estimator]) -> None:
    """And to bfloat16's accuracy it is as without: with this seed the drawn targets are the same."""
    found = []
    for enabled in (False, True):
        model = Network()
        estimator = make(model)
        x, y = data(torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            logits = model(x)
            assert logits.dtype == (torch.bfloat16 if enabled else torch.float32)
            loss = F.cross_entropy(logits, y)
        loss.backward()
        found.append(numbers(estimator))
    assert all(part.dtype == torch.float32 for part in found[1])
    for plain, mixed in zip(*found, strict=True):
        assert float((mixed - plain).norm()) < 0.03 * float(plain.norm())


@pytest.mark.parametrize("name", ["inputs", "exact", "empirical"])
def test_micro_batches_of_unequal_size_add_up_to_one_batch(name: str) -> None:
    """Each with the mean of its own loss; whether backward follows each forward or they all come at the end."""
    expected, _ = expected_of(ESTIMATORS[name])
    x, y = data()
    for at_the_end in (False, True):
        model = Network().double()
        estimator = ESTIMATORS[name](model)
        losses = []
        for part in (slice(0, 2), slice(2, 6)):
            losses.append(F.cross_entropy(model(x[part]), y[part]))
            if not at_the_end:
                losses.pop().backward()
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(numbers(estimator), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("inputs", "outputs"), [(4, 0), (0, 3)])
def test_a_layer_without_a_weight_takes_plain_steps(inputs: int, outputs: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that there is nothing to initialise
        empty = nn.Linear(inputs, outputs)
    with pytest.warns(UserWarning, match=r"no curvature for 1 \(no inputs or no outputs\)"):
        optimizer = FOOF(nn.Sequential(nn.Linear(2, 4), empty), lr=0.1)
    assert [block.name for block in optimizer._estimator.blocks] == ["0"]
