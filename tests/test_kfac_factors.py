"""K-FAC's factors against curvlinops, per-example sums by autograd, and the exact Gauss-Newton matrix."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from curvlinops import KFACLinearOperator
from torch import Tensor, nn

from fedpm_flwr.curvature import Kronecker, from_matrix, to_matrix
from fedpm_flwr.estimators import GaussNewtonBartlett, KroneckerFactors

Loss = nn.CrossEntropyLoss | nn.MSELoss
LOSSES: dict[str, Loss] = {"cross-entropy": nn.CrossEntropyLoss(), "mse": nn.MSELoss()}
CURVLINOPS = {"exact": "type-2", "empirical": "empirical"}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(3, 2, 2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(8, 4),
        nn.Sigmoid(),
        nn.Linear(4, 3),
    ).double()


def batch(loss: str, examples: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(examples, 1, 6, 6, dtype=torch.float64, generator=generator)
    if loss == "mse":
        return x, torch.randn(examples, 3, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 3, (examples,), generator=generator)


def measure(
    model: nn.Module, x: Tensor, y: Tensor, loss: str, fisher: str, **options: Any
) -> dict[str, Kronecker]:
    estimator = KroneckerFactors(model, fisher, loss, **{"class_dim": 1, **options})
    LOSSES[loss](model(x), y).backward()
    found = estimator.collect()
    assert all(isinstance(P, Kronecker) for P in found.values())
    return {block.name: P for block, P in found.items() if isinstance(P, Kronecker)}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("fisher", CURVLINOPS)
def test_equals_curvlinops(fisher: str, loss: str) -> None:
    """A is its input factor; G its gradient factor, both with all scalings.

    But for the empirical factor of the squared error, a mean over examples and outputs: curvlinops
    takes each output's term for an example of its own, which makes it as many times larger.
    """
    factor = 3 if (fisher, loss) == ("empirical", "mse") else 1
    model = network()
    x, y = batch(loss)
    operator = KFACLinearOperator(
        model,
        LOSSES[loss],
        list(model.parameters()),
        [(x, y)],
        fisher_type=CURVLINOPS[fisher],
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    operator.compute_kronecker_factors()
    state = operator.state_dict()
    found = measure(model, x, y, loss, fisher)
    assert set(found) == {"0", "2", "5", "7"}
    for name, P in found.items():
        torch.testing.assert_close(P.right, state["input_covariances"][name], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(factor * P.left, state["gradient_covariances"][name], rtol=1e-10, atol=1e-14)


def assert_sampled_is_exact_on_average(model: nn.Module, x: Tensor, y: Tensor, loss: str) -> None:
    """Within three standard errors. Every example has a target of its own: so a batch of copies is many draws."""
    exact = measure(model, x, y, loss, "exact")
    copies = 150, *[1] * (x.ndim - 1)
    many = x.repeat(*copies), y.repeat(150, *[1] * (y.ndim - 1))
    draws = [measure(model, *many, loss, "sampled", seed=seed) for seed in range(20)]
    for name, P in exact.items():
        lefts = torch.stack([draw[name].left for draw in draws])
        error = lefts.std(dim=0) / len(draws) ** 0.5
        assert float((lefts.mean(dim=0) - P.left).norm()) < 3 * float(error.norm())
        assert float(error.norm()) < 0.03 * float(P.left.norm()), "too few draws to tell anything"


@pytest.mark.parametrize("loss", LOSSES)
def test_sampled_factors_are_the_exact_ones_within_three_standard_errors(loss: str) -> None:
    assert_sampled_is_exact_on_average(network(), *batch(loss), loss)


def mixing_network() -> nn.Sequential:
    """Outputs [examples, classes, positions], each position of them of several positions of every layer before."""
    torch.manual_seed(5)
    return nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv1d(3, 3, 3, padding=1)).double()


def mixing_batch(loss: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(4, 2, 5, dtype=torch.float64, generator=generator)
    if loss == "mse":
        return x, torch.randn(4, 3, 5, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 3, (4, 5), generator=generator)


@pytest.mark.parametrize("loss", LOSSES)
def test_so_they_are_where_outputs_have_positions_that_a_layer_mixes(loss: str) -> None:
    assert_sampled_is_exact_on_average(mixing_network(), *mixing_batch(loss), loss)


@pytest.mark.parametrize("loss", LOSSES)
def test_products_of_the_gradients_of_two_positions_are_not_in_the_exact_factor(loss: str) -> None:
    """G = Σ J_{n,t}ᵀ H_{n,t} J_{n,t} / m, summed over a layer's positions: every output position for itself."""
    model = mixing_network()
    x, y = mixing_batch(loss)
    left = measure(model, x, y, loss, "exact")["0"].left
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for n in range(4):
        hidden = model[0](x[n : n + 1]).detach()
        z = model[1:](hidden).detach()
        jacobian = torch.func.jacrev(model[1:])(hidden)[0, :, :, 0]  # [classes, t, channels, positions]
        for t in range(5):
            target = y[n, t][None] if loss == "cross-entropy" else y[n, :, t][None]
            inner = torch.func.hessian(lambda z, target=target: LOSSES[loss](z[None], target))(z[0, :, t])
            expected += torch.einsum("cip,cd,djp->ij", jacobian[:, t], inner, jacobian[:, t]) / 20
    torch.testing.assert_close(left, expected, rtol=1e-10, atol=1e-14)


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(2, 4, 3, stride=2, padding=1), (2, 9)),
    "conv1d, groups": (nn.Conv1d(4, 4, 3, groups=2), (4, 6)),
    "conv2d, depthwise": (nn.Conv2d(3, 6, 2, groups=3, bias=False), (3, 4, 4)),
    "conv2d, dilation": (nn.Conv2d(2, 3, 2, dilation=2), (2, 5, 5)),
    "conv3d": (nn.Conv3d(1, 2, 2), (1, 3, 3, 3)),
    "linear over a sequence": (nn.Linear(3, 4), (5, 3)),
}


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_left_factor_is_the_sum_over_examples_and_positions(name: str, fisher: str) -> None:
    """G = Σ b bᵀ / m with b the gradient of an example's own loss by the layer's output at a position.

    For the exact one the sum is over every label too, by its probability.
    """
    layer, shape = LAYERS[name]
    torch.manual_seed(1)
    x = torch.randn(4, *shape, dtype=torch.float64)
    layer = layer.double()
    head = nn.Linear(layer(x)[0].numel(), 3).double()
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), head)
    y = torch.tensor([0, 1, 2, 1])
    found = measure(model, x, y, "cross-entropy", fisher)["0"]
    groups = getattr(layer, "groups", 1)
    sums = torch.zeros(groups, *found.left.shape[-2:]).double()
    for example, label in zip(x, y, strict=True):
        output = layer(example[None]).detach().requires_grad_()
        logits = head(torch.tanh(output).flatten(1))
        p = logits.softmax(dim=1)[0].tolist()
        labels = {int(label): 1.0} if fisher == "empirical" else dict(enumerate(p))
        for each, weight in labels.items():
            loss = F.cross_entropy(logits, torch.tensor([each]))
            (gradient,) = torch.autograd.grad(loss, output, retain_graph=True)
            positions = gradient[0] if isinstance(layer, nn.Linear) else gradient[0].flatten(1).T
            b = positions.reshape(len(positions), groups, -1).movedim(1, 0)
            sums += weight * b.mT @ b
    torch.testing.assert_close(found.left.reshape(sums.shape), sums / len(x), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("loss", LOSSES)
def test_of_a_last_linear_layer_with_one_example_it_is_the_gauss_newton_matrix(loss: str) -> None:
    """There no expectation is split: G ⊗ A = Jᵀ H J, to rounding."""
    model = network()[5:]
    x, y = torch.randn(1, 8, dtype=torch.float64), batch(loss, 1)[1]
    P = measure(model, x, y, loss, "exact")["7"]
    hidden = torch.sigmoid(model[0](x)).detach()
    layer = model[2]
    assert isinstance(layer, nn.Linear)
    joint = torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach()

    def objective(matrix: Tensor) -> Tensor:
        found: Tensor = LOSSES[loss](F.linear(hidden, matrix[:, :-1], matrix[:, -1]), y)
        return found

    hessian = torch.func.hessian(objective)(joint).reshape(15, 15)  # the layer is the last: nothing is left out
    torch.testing.assert_close(P.to_dense(15), hessian)


LINEAR: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "one layer": (lambda: [nn.Linear(3, 4)], (3,)),
    "deep": (lambda: [nn.Linear(3, 4), nn.Linear(4, 2, bias=False), nn.Linear(2, 3)], (3,)),
    "deep, with convolutions of one position": (
        lambda: [nn.Conv1d(2, 3, 4), nn.Conv1d(3, 2, 1, bias=False), nn.Flatten(), nn.Linear(2, 3)],
        (2, 4),
    ),
    "groups": (lambda: [nn.Conv1d(4, 6, 3, groups=2), nn.Flatten()], (4, 3)),
}


@pytest.mark.parametrize("name", LINEAR)
def test_of_linear_networks_with_the_squared_error_it_is_each_layers_gauss_newton_matrix(name: str) -> None:
    """There b does not depend on x, so the mean of (b bᵀ) ⊗ (x xᵀ) is G ⊗ A, for any number of examples."""
    torch.manual_seed(7)
    make, shape = LINEAR[name]
    model = nn.Sequential(*make()).double()
    x = torch.randn(5, *shape, dtype=torch.float64)
    y = torch.randn_like(model(x)).detach()
    estimator = KroneckerFactors(model, "exact", "mse")
    model(x)
    found = estimator.collect()
    assert len(found) == sum(bool(list(layer.parameters())) for layer in model)
    state = dict(model.named_parameters())
    for block, P in found.items():
        keys = block.parameters
        shapes = [state[key].shape for key in keys]
        matrix = to_matrix([state[key].detach() for key in keys])

        def outputs(matrix: Tensor, keys: tuple[str, ...] = keys, shapes: list[torch.Size] = shapes) -> Tensor:
            changed = dict(zip(keys, from_matrix(matrix, shapes), strict=True))
            z: Tensor = torch.func.functional_call(model, changed, (x,))
            return z.flatten()

        jacobian = torch.func.jacrev(outputs)(matrix).reshape(y.numel(), -1)
        inner = torch.func.hessian(lambda z: F.mse_loss(z, y.flatten()))(outputs(matrix))
        expected = jacobian.T @ inner @ jacobian
        torch.testing.assert_close(P.to_dense(matrix.numel()), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_outputs_with_positions_count_every_position_as_an_example(fisher: str) -> None:
    torch.manual_seed(2)
    linear = nn.Linear(3, 4).double()
    x, y = torch.randn(5, 6, 3, dtype=torch.float64), torch.randint(0, 4, (5, 6))
    sequence = nn.Sequential(linear, Transposed())
    one = measure(sequence, x, y, "cross-entropy", fisher)["0"]
    two = measure(nn.Sequential(linear), x.flatten(0, 1), y.flatten(), "cross-entropy", fisher)["0"]
    torch.testing.assert_close(one.left, two.left)
    torch.testing.assert_close(one.right, two.right)


@pytest.mark.parametrize("fisher", ["exact", "empirical", "sampled"])
def test_classes_may_be_last_if_that_is_said(fisher: str) -> None:
    """As of language models: [examples, positions, classes]."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(3, 4)).double()
    x, y = torch.randn(5, 6, 3, dtype=torch.float64), torch.randint(0, 4, (5, 6))
    flat = KroneckerFactors(model, fisher)
    F.cross_entropy(model(x.flatten(0, 1)), y.flatten()).backward()
    flat.detach()
    last = KroneckerFactors(model, fisher, class_dim=-1)
    F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    for block, P in last.collect().items():
        torch.testing.assert_close(P.parts(), flat.collect()[block].parts())


@pytest.mark.parametrize(
    "make", [KroneckerFactors, GaussNewtonBartlett, partial(KroneckerFactors, fisher="empirical")]
)
def test_where_classes_are_is_not_guessed(
    make: Callable[..., KroneckerFactors | GaussNewtonBartlett],
) -> None:
    x = torch.randn(5, 4, 3)
    for options, message in (
        ({}, r"outputs of shape \(5, 4, 2\): which dimension holds the classes\?"),
        ({"class_dim": 0}, r"class_dim=0 of outputs of shape \(5, 4, 2\)"),
        ({"class_dim": 3}, r"class_dim=3 of outputs of shape \(5, 4, 2\)"),
    ):
        model = nn.Linear(3, 2)
        estimator = make(model, **options)
        with pytest.raises(ValueError, match=message):
            model(x)
        estimator.detach()


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mT


@pytest.mark.parametrize("fisher", ["exact", "sampled", "empirical"])
def test_an_activation_in_place_changes_nothing(fisher: str) -> None:
    factors = []
    for inplace in (False, True):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=inplace), nn.Linear(5, 3)).double()
        x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(0, 3, (6,))
        factors.append(measure(model, x, y, "cross-entropy", fisher)["0"].left)
    torch.testing.assert_close(*factors)


@pytest.mark.parametrize("fisher", ["exact", "sampled", "empirical"])
def test_the_training_loops_own_gradients_are_untouched(fisher: str) -> None:
    x, y = batch("cross-entropy")
    plain, watched = network(), network()
    F.cross_entropy(plain(x), y).backward()
    measure(watched, x, y, "cross-entropy", fisher)
    for p, q in zip(plain.parameters(), watched.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p.grad, q.grad)


def test_several_batches_are_as_one() -> None:
    model = network()
    x, y = batch("cross-entropy")
    estimator = KroneckerFactors(model, "exact")
    for part in torch.split(x, 2):
        model(part)
    whole = measure(model, x, y, "cross-entropy", "exact")
    for block, P in estimator.collect().items():
        assert isinstance(P, Kronecker)
        torch.testing.assert_close(P.left, whole[block.name].left)
        torch.testing.assert_close(P.right, whole[block.name].right)


def test_empty_batches_and_layers_that_are_not_recorded_are_passed_over() -> None:
    model = network()
    estimator = KroneckerFactors(model, "exact")
    model(torch.zeros(0, 1, 6, 6, dtype=torch.float64))
    assert estimator.collect() == {}
    estimator.recording = []
    model(batch("mse")[0])
    assert estimator.collect() == {}
    estimator.recording = estimator.blocks[1:2]
    model(batch("mse")[0])
    assert [block.name for block in estimator.collect()] == ["2"]
    model.eval()
    model(batch("mse")[0])
    assert estimator.collect() == {}


def test_tied_layers_and_repeated_calls_add_up() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.layer(torch.tanh(self.layer(x)))
            return found

    torch.manual_seed(4)
    model = Twice().double()
    x = torch.randn(5, 3, dtype=torch.float64)
    P = measure(model, x, torch.zeros(5, 3).double(), "mse", "exact")["layer"]
    hidden = torch.tanh(model.layer(x)).detach()
    torch.testing.assert_close(P.right, (x.T @ x + hidden.T @ hidden) / 10)
    first = torch.stack([(model.layer.weight * (1 - h**2)).T for h in hidden]).detach()  # ∂outputs/∂first output
    expected = 2 / 3 * (torch.eye(3).double() + torch.einsum("nij,nkj->ik", first, first) / 5)
    torch.testing.assert_close(P.left, expected)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("fisher", ["exact", "sampled"])
def test_outputs_that_are_not_finite_are_seen_in_the_factors_not_raised(fisher: str, loss: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    estimator = KroneckerFactors(model, fisher, loss)
    model(torch.full((4, 3), torch.nan))
    assert all(not torch.isfinite(P.parts()["right"]).all() for P in estimator.collect().values())


def test_what_kfac_cannot_measure_is_named() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(3, 2), "attention": nn.MultiheadAttention(2, 1)})
    with pytest.warns(UserWarning, match="no curvature for") as caught:
        assert KroneckerFactors(model).blocks == []
    for name in ("embedding (Embedding)", "attention (MultiheadAttention)", "attention.out_proj (NonDyn"):
        assert name in str(caught[0].message)


def test_a_model_that_returns_no_tensor_is_refused_unless_it_has_logits() -> None:
    class Wrapped(nn.Module):
        def __init__(self, make: Callable[[Tensor], object]) -> None:
            super().__init__()
            self.layer, self.make = nn.Linear(3, 2), make

        def forward(self, x: Tensor) -> object:
            return self.make(self.layer(x))

    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    x = torch.randn(4, 3)
    model = Wrapped(Output)
    estimator = KroneckerFactors(model, "exact")
    model(x)
    assert len(estimator.collect()) == 1
    model = Wrapped(lambda z: (z, z))
    estimator = KroneckerFactors(model, "exact")
    with pytest.raises(TypeError, match="needs a model that returns one tensor"):
        model(x)


@pytest.mark.parametrize("make", [KroneckerFactors, GaussNewtonBartlett])
def test_cross_entropy_of_one_output_is_refused(
    make: Callable[[nn.Module], KroneckerFactors | GaussNewtonBartlett],
) -> None:
    """Its softmax is always 1: G would be exactly 0, and P the damping alone."""
    model = nn.Linear(3, 1)
    estimator = make(model)
    with pytest.raises(ValueError, match=r'two outputs for two classes, loss="mse" if .* or else FOOF'):
        model(torch.randn(4, 3))
    model.eval()
    model(torch.randn(4, 3))  # which is not measured
    assert estimator.collect() == {}


def test_of_one_output_the_empirical_factor_is_of_the_loss_that_is_trained() -> None:
    model = nn.Linear(3, 1).double()
    x, y = torch.randn(4, 3).double(), torch.tensor([[0.0], [1.0], [1.0], [0.0]]).double()
    estimator = KroneckerFactors(model, "empirical")
    F.binary_cross_entropy_with_logits(z := model(x), y).backward()
    (P,) = estimator.collect().values()
    assert isinstance(P, Kronecker)
    torch.testing.assert_close(P.left, (z.sigmoid() - y).detach().square().mean(0, keepdim=True))
