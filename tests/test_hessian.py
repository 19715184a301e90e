"""The exact Hessian and Gauss-Newton matrix against curvlinops and torch.func."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from curvlinops import GGNLinearOperator, HessianLinearOperator
from torch import Tensor, nn

from fedpm_flwr.curvature import Dense, from_matrix, to_matrix
from fedpm_flwr.estimators import ExactHessian, absolute


class Signal(nn.Module):
    """Features as a signal of one channel."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, None]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "logistic": lambda: nn.Linear(4, 2),
    "softmax without bias": lambda: nn.Linear(4, 3, bias=False),
    "mlp": lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)),
    "convolution": lambda: nn.Sequential(
        Signal(), nn.Conv1d(1, 2, 2), nn.Sigmoid(), nn.Flatten(), nn.Linear(6, 2)
    ),
}


def setup(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = MODELS[name]().double()
    x = torch.randn(7, 4, dtype=torch.float64)
    return model, x, torch.randint(0, 2, (7,))


def matrix_of(estimator: ExactHessian) -> Tensor:
    (P,) = estimator.collect().values()
    assert isinstance(P, Dense)
    return P.matrix


def places(model: nn.Module) -> Tensor:
    """Where each entry of the block's vec(Δ) is in the parameters flattened one after another."""
    numbers, start = [], 0
    for p in model.parameters():
        numbers.append(start + torch.arange(p.numel()).reshape(p.shape))
        start += p.numel()
    return to_matrix(numbers).flatten()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_equals_curvlinops(matrix: str, name: str) -> None:
    model, x, y = setup(name)
    operator = {"hessian": HessianLinearOperator, "ggn": GGNLinearOperator}[matrix]
    parameters = list(model.parameters())
    linear = operator(model, nn.CrossEntropyLoss(), parameters, [(x, y)], check_deterministic=False)
    expected = linear @ torch.eye(sum(p.numel() for p in parameters)).double()
    order = places(model)
    expected = expected[order][:, order]
    estimator = ExactHessian(model, matrix)
    outputs = model(x)
    estimator.measure(F.cross_entropy(outputs, y), outputs)
    found = matrix_of(estimator)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    assert matrix == "ggn" or name != "mlp" or torch.linalg.eigvalsh(found)[0] < 0, "it is measured with its signs"


def test_of_one_layer_it_acts_on_weight_and_bias_side_by_side() -> None:
    model, x, y = setup("logistic")
    assert isinstance(model, nn.Linear)
    joint = to_matrix([model.weight.detach(), model.bias.detach()])

    def objective(matrix: Tensor) -> Tensor:
        weight, bias = from_matrix(matrix, [model.weight.shape, model.bias.shape])
        return F.cross_entropy(F.linear(x, weight, bias), y) + 0.05 * matrix.square().sum()

    estimator = ExactHessian(model)
    estimator.measure(F.cross_entropy(model(x), y) + 0.05 * sum(p.square().sum() for p in model.parameters()))
    torch.testing.assert_close(matrix_of(estimator), torch.func.hessian(objective)(joint).reshape(10, 10))


def test_a_positive_definite_matrix_stays_as_it_is_and_an_indefinite_one_becomes_its_absolute_value() -> None:
    positive = Dense(torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64))
    assert absolute(positive) is positive
    turned, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
    indefinite = (turned * torch.tensor([3.0, -2.0, 0.0])) @ turned.T
    found = absolute(Dense(indefinite))
    assert isinstance(found, Dense)
    torch.testing.assert_close(found.matrix, (turned * torch.tensor([3.0, 2.0, 0.0])) @ turned.T)


def test_measurements_are_averaged_and_nothing_is_measured_where_it_is_not_recording() -> None:
    model, x, y = setup("logistic")
    estimator = ExactHessian(model)
    estimator.measure(F.cross_entropy(model(x[:3]), y[:3]))
    estimator.measure(F.cross_entropy(model(x[3:6]), y[3:6]))
    halves = matrix_of(estimator)
    estimator.measure(F.cross_entropy(model(x[:6]), y[:6]))
    torch.testing.assert_close(halves, matrix_of(estimator))
    estimator.recording = []
    estimator.measure(F.cross_entropy(model(x), y))
    assert estimator.collect() == {}


def test_frozen_parameters_are_not_in_it() -> None:
    model, x, y = setup("mlp")
    assert isinstance(model, nn.Sequential)
    model[0].requires_grad_(False)
    estimator = ExactHessian(model)
    assert estimator.blocks[0].parameters == ("2.weight", "2.bias")
    estimator.measure(F.cross_entropy(model(x), y))
    assert matrix_of(estimator).shape == (12, 12)
    model.requires_grad_(False)
    assert ExactHessian(model).blocks == []


def test_losses_without_curvature_give_none() -> None:
    model, x, _ = setup("logistic")
    for matrix in ("hessian", "ggn"):
        estimator = ExactHessian(model, matrix)
        outputs = model(x)
        estimator.measure(outputs.sum(), outputs)
        assert torch.equal(matrix_of(estimator), torch.zeros(10, 10, dtype=torch.float64))


def test_misuse_is_named() -> None:
    model, x, y = setup("mlp")
    with pytest.raises(ValueError, match="an exact matrix of 27 parameters, more than 20"):
        ExactHessian(model, max_side=20)
    with pytest.raises(ValueError, match="unknown matrix 'fisher'; allowed: hessian, ggn"):
        ExactHessian(model, "fisher")
    with pytest.raises(TypeError, match=r"needs measure\(loss, outputs\)"):
        ExactHessian(model, "ggn").measure(F.cross_entropy(model(x), y))
