"""The FOOF optimizer: its step, its schedule, its damping, and what it says of itself."""

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedpm_flwr.curvature import CurvatureError, KroneckerRight
from fedpm_flwr.optim import FOOF, correct_gradients


def moment(x: Tensor) -> Tensor:
    with_ones = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
    return with_ones.T @ with_ones / len(x)


def backward(model: nn.Module, x: Tensor) -> None:
    model.zero_grad()
    model(x).square().sum().backward()


def joint(layer: nn.Linear, gradient: bool = False) -> Tensor:
    weight, bias = (layer.weight.grad, layer.bias.grad) if gradient else (layer.weight.data, layer.bias.data)
    assert weight is not None
    assert bias is not None
    return torch.cat([weight, bias[:, None]], dim=1).clone()


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3).double()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_one_step_is_the_damped_inverse_times_the_gradient(layer: nn.Linear, x: Tensor) -> None:
    optimizer = FOOF(layer, lr=0.5, damping=0.1)
    backward(layer, x)
    before, gradient = joint(layer), joint(layer, gradient=True)
    optimizer.step()
    damped = moment(x) + 0.1 * torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(joint(layer), before - 0.5 * gradient @ torch.linalg.inv(damped))
    (said,) = optimizer.preconditioners()
    assert isinstance(said.curvature, KroneckerRight)
    torch.testing.assert_close(said.curvature.factor, moment(x))
    assert said.damping == 0.1
    assert said.block.parameters == ("weight", "bias")


def test_a_convolution_steps_like_the_linear_layer_over_its_patches() -> None:
    torch.manual_seed(3)
    conv = nn.Conv2d(2, 3, 2, stride=2).double()
    linear = nn.Linear(8, 3).double()
    linear.load_state_dict({"weight": conv.weight.flatten(1), "bias": conv.bias})
    images = torch.randn(5, 2, 4, 4, dtype=torch.float64)
    patches = nn.functional.unfold(images, 2, stride=2).transpose(1, 2).reshape(-1, 8)
    for model, inputs in ((conv, images), (linear, patches)):
        optimizer = FOOF(model, lr=0.1, damping=0.01)
        backward(model, inputs)
        optimizer.step()
    torch.testing.assert_close(conv.weight.flatten(1), linear.weight)
    torch.testing.assert_close(conv.bias, linear.bias)


def test_layers_without_curvature_take_plain_gradient_steps() -> None:
    norm = nn.LayerNorm(4)
    model = nn.Sequential(norm, nn.Linear(4, 2))
    with pytest.warns(UserWarning, match=r"0 \(LayerNorm\)"):
        optimizer = FOOF(model, lr=0.1)
    backward(model, torch.randn(3, 4))
    assert norm.weight.grad is not None
    before, gradient = norm.weight.data.clone(), norm.weight.grad.clone()
    optimizer.step()
    torch.testing.assert_close(norm.weight.data, before - 0.1 * gradient)
    assert [said.block.name for said in optimizer.preconditioners()] == ["1"]


def test_running_average_and_intervals(layer: nn.Linear) -> None:
    """Measured at steps 0, 2, 4; inverted at steps 0 and 3: so steps 1 and 2 use the inverse of step 0."""
    optimizer = FOOF(layer, lr=0.01, damping=1.0, ema=0.75, refresh_interval=2, inverse_interval=3)
    generator = torch.Generator().manual_seed(4)
    seen: list[Tensor] = []
    average = inverse = None
    for step in range(5):
        x = torch.randn(6, 4, dtype=torch.float64, generator=generator)
        backward(layer, x)
        before, gradient = joint(layer), joint(layer, gradient=True)
        optimizer.step()
        if step % 2 == 0:
            seen.insert(0, moment(x))
            weights = [0.75**age for age in range(len(seen))]
            average = sum((w * a for w, a in zip(weights, seen, strict=True)), torch.zeros(5, 5)) / sum(weights)
        assert average is not None
        if step % 3 == 0:
            inverse = torch.linalg.inv(average + torch.eye(5, dtype=torch.float64))
        assert inverse is not None
        torch.testing.assert_close(joint(layer), before - 0.01 * gradient @ inverse)
    (said,) = optimizer.preconditioners()
    assert isinstance(said.curvature, KroneckerRight)
    torch.testing.assert_close(said.curvature.factor, average)


def test_gradient_accumulation_measures_all_of_the_batch(layer: nn.Linear, x: Tensor) -> None:
    optimizer = FOOF(layer)
    for part in torch.split(x, 2):
        layer(part).square().sum().backward()
    optimizer.step()
    (said,) = optimizer.preconditioners()
    assert isinstance(said.curvature, KroneckerRight)
    torch.testing.assert_close(said.curvature.factor, moment(x))


def test_with_a_codec_it_steps_by_the_curvature_as_decoded(layer: nn.Linear, x: Tensor) -> None:
    optimizer = FOOF(layer, lr=1.0, damping=0.1, codec="triangle-float32")
    backward(layer, x)
    before, gradient = joint(layer), joint(layer, gradient=True)
    optimizer.step()
    decoded = moment(x).float().double()
    assert not torch.equal(decoded, moment(x))
    damped = decoded + 0.1 * torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(joint(layer), before - gradient @ torch.linalg.inv(damped), rtol=1e-12, atol=1e-12)


def test_damping_is_raised_until_there_is_an_inverse_and_said_once(layer: nn.Linear) -> None:
    x = torch.full((6, 4), 1e9, dtype=torch.float64)  # A is singular, and 1e-3 is lost beside 1e18
    optimizer = FOOF(layer, lr=1e-9, damping=1e-3, refresh_interval=1, inverse_interval=1)
    backward(layer, x)
    with pytest.warns(UserWarning, match="layer '': damping raised from 0.001 to") as caught:
        optimizer.step()
    assert [warning.filename for warning in caught] == [__file__]
    (said,) = optimizer.preconditioners()
    assert said.damping > 1e-3
    assert torch.isfinite(layer.weight).all()


def test_a_layer_whose_inputs_were_not_seen_is_named_once(layer: nn.Linear, x: Tensor) -> None:
    optimizer = FOOF(layer, lr=0.1)
    layer.eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            backward(layer, x)
            before, gradient = joint(layer), joint(layer, gradient=True)
            optimizer.step()
            torch.testing.assert_close(joint(layer), before - 0.1 * gradient)
    assert [warning.filename for warning in caught] == [__file__]
    assert "layer '' has a gradient but" in str(caught[0].message)
    assert optimizer.preconditioners() == []
    layer.train()
    backward(layer, x)
    optimizer.step()
    assert len(optimizer.preconditioners()) == 1


def test_a_measurement_that_is_not_finite_is_dropped_once_there_is_one(layer: nn.Linear, x: Tensor) -> None:
    optimizer = FOOF(layer, refresh_interval=1, inverse_interval=1)
    backward(layer, x)
    optimizer.step()
    layer(torch.full_like(x, torch.inf))  # of a step that a GradScaler skipped
    backward(layer, x)
    optimizer.step()
    (said,) = optimizer.preconditioners()
    assert isinstance(said.curvature, KroneckerRight)
    torch.testing.assert_close(said.curvature.factor, moment(x))


def test_each_group_has_its_own_damping_and_a_layer_goes_by_its_weight(x: Tensor) -> None:
    first, second = nn.Linear(4, 3), nn.Linear(3, 2)
    model = nn.Sequential(first, second).double()
    groups: list[dict[str, Any]] = [
        {"params": [first.weight], "damping": 7.0},
        {"params": [first.bias, *second.parameters()], "damping": 0.5},
    ]
    optimizer = FOOF(model, groups)
    backward(model, x)
    optimizer.step()
    assert [said.damping for said in optimizer.preconditioners()] == [7.0, 0.5]


def test_a_layer_with_a_gradient_for_its_weight_only_takes_a_plain_step(layer: nn.Linear, x: Tensor) -> None:
    optimizer = FOOF(layer, lr=0.1)
    backward(layer, x)
    before, gradient = joint(layer), joint(layer, gradient=True)
    layer.bias.grad = None
    optimizer.step()
    torch.testing.assert_close(layer.weight.data, before[:, :-1] - 0.1 * gradient[:, :-1])
    assert torch.equal(layer.bias, before[:, -1])


def test_curvature_stays_float32_when_the_state_of_a_half_precision_model_is_loaded() -> None:
    model = nn.Linear(4, 3).bfloat16()
    optimizer = FOOF(model, refresh_interval=1, inverse_interval=1)
    for _ in range(2):
        backward(model, torch.randn(6, 4, dtype=torch.bfloat16))
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        (said,) = optimizer.preconditioners()
        assert isinstance(said.curvature, KroneckerRight)
        assert said.curvature.factor.dtype == torch.float32


def test_no_parameters_are_an_error(layer: nn.Linear) -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        FOOF(layer, [])


def test_hooks_go_with_the_optimizer(layer: nn.Linear) -> None:
    optimizer = FOOF(layer)
    assert len(layer._forward_pre_hooks) == 1
    del optimizer
    assert len(layer._forward_pre_hooks) == 0


def test_no_damping_and_a_singular_factor_is_an_error(layer: nn.Linear) -> None:
    optimizer = FOOF(layer, damping=0.0)
    backward(layer, torch.zeros(2, 4, dtype=torch.float64))
    with pytest.raises(CurvatureError, match=r"layer '': .* its damping is 0"):
        optimizer.step()


def test_inputs_that_are_not_finite_are_an_error(layer: nn.Linear) -> None:
    optimizer = FOOF(layer)
    backward(layer, torch.full((2, 4), torch.nan, dtype=torch.float64))
    with pytest.raises(CurvatureError, match="not finite"):
        optimizer.step()


def test_param_groups_schedulers_and_closures(layer: nn.Linear, x: Tensor) -> None:
    groups: list[dict[str, Any]] = [{"params": [layer.weight]}, {"params": [layer.bias], "lr": 0.0}]
    optimizer = FOOF(layer, groups, lr=0.4)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    bias, weight = layer.bias.data.clone(), layer.weight.data.clone()

    def closure() -> float:
        backward(layer, x)
        return 3.0

    assert optimizer.step(closure) == 3.0
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.2
    assert torch.equal(layer.bias, bias)
    assert not torch.equal(layer.weight, weight)


def test_state_dict_round_trip(x: Tensor) -> None:
    torch.manual_seed(5)
    first = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    options: dict[str, Any] = {"lr": 0.1, "damping": 0.1, "refresh_interval": 2, "inverse_interval": 3}
    one = FOOF(first, **options)
    for _ in range(3):
        backward(first, x)
        one.step()
    second = copy.deepcopy(first)
    two = FOOF(second, **options)
    two.load_state_dict(one.state_dict())
    for _ in range(4):
        for model, optimizer in ((first, one), (second, two)):
            backward(model, x)
            optimizer.step()
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    "wrong", [{"lr": -1.0}, {"damping": -1.0}, {"ema": 1.5}, {"refresh_interval": 0}, {"codec": "zip"}]
)
def test_arguments_out_of_range(layer: nn.Linear, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be|between|unknown codec"):
        FOOF(layer, **wrong)


def test_frozen_parameters_and_missing_gradients_are_left_alone(x: Tensor) -> None:
    body = nn.Linear(4, 4)
    model = nn.Sequential(body, nn.Linear(4, 2)).double()
    body.requires_grad_(False)
    optimizer = FOOF(model)
    frozen = body.weight.clone()
    optimizer.step()  # no gradients yet
    backward(model, x)
    optimizer.step()
    assert torch.equal(body.weight, frozen)
    assert [said.block.name for said in optimizer.preconditioners()] == ["1"]


def test_only_the_parameters_it_is_given_are_stepped_measured_and_kept(x: Tensor) -> None:
    body, head = nn.Linear(4, 4), nn.Linear(4, 2)
    model = nn.Sequential(body, head).double()
    optimizer = FOOF(model, head.parameters())
    untouched = body.weight.clone()
    backward(model, x)
    optimizer.step()
    assert torch.equal(body.weight, untouched)
    assert [said.block.name for said in optimizer.preconditioners()] == ["1"]
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_gives_what_the_cpu_gives(x: Tensor) -> None:
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    twin = copy.deepcopy(model).cuda()
    for network, inputs in ((model, x), (twin, x.cuda())):
        optimizer = FOOF(network, damping=0.1)
        for _ in range(3):
            backward(network, inputs)
            optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q.cpu())


class LanguageModel(nn.Module):
    """Its output layer is the embedding's weight, functionally or as a tied layer of its own."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.body, self.tied = nn.Embedding(9, 4), nn.Linear(4, 4), tied
        self.head = nn.Linear(4, 9)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.body(self.embedding(x)))
        return F.linear(h, self.embedding.weight) if self.tied else self.head(h)


@pytest.mark.parametrize("by_closure", [False, True])
def test_an_embedding_that_is_used_functionally_too_takes_plain_steps(by_closure: bool) -> None:
    model, x = LanguageModel(), torch.tensor([0, 1, 1, 2])
    optimizer = FOOF(model, lr=0.5, damping=0.1)

    def closure() -> float:
        F.cross_entropy(model(x), (x + 1) % 9).backward()
        return 0.0

    before = model.embedding.weight.detach().clone()
    if not by_closure:
        closure()
    take = (lambda: optimizer.step(closure)) if by_closure else optimizer.step
    with pytest.warns(UserWarning, match="layer 'embedding': rows that were not looked up have gradients") as said:
        take()
    assert len(said) == 1
    assert said[0].filename == __file__
    assert model.embedding.weight.grad is not None
    torch.testing.assert_close(model.embedding.weight.detach(), before - 0.5 * model.embedding.weight.grad)
    assert [layer.block.name for layer in optimizer.preconditioners()] == ["body"]
    closure()
    optimizer.step()
    assert [layer.block.name for layer in optimizer.preconditioners()] == ["body"]


def test_what_is_added_to_gradients_is_not_taken_for_another_use() -> None:
    """Control variates and proximal terms reach rows that no example looks up, as weight decay does."""
    model, x = LanguageModel(tied=False), torch.tensor([0, 1, 1, 2])
    optimizer = FOOF(model, lr=0.5, damping=0.1, weight_decay=0.1)
    correct_gradients(optimizer, torch.ones_like)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            F.cross_entropy(model(x), (x + 1) % 9).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [layer.block.name for layer in optimizer.preconditioners()] == ["embedding", "body", "head"]
