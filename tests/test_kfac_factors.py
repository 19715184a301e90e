"""K-FAC's factors against curvlinops, per-example sums by autograd, and the exact Gauss-Newton matrix."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from curvlinops import KFACLinearOperator
from torch import Tensor, nn

from fedpm_flwr.curvature import Kronecker
from fedpm_flwr.estimators import KroneckerFactors

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
    model: nn.Module, x: Tensor, y: Tensor, loss: str, fisher: str, **options: int
) -> dict[str, Kronecker]:
    estimator = KroneckerFactors(model, fisher, loss, **options)  # type: ignore[arg-type]
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


@pytest.mark.parametrize("loss", LOSSES)
def test_sampled_factors_are_the_exact_ones_within_three_standard_errors(loss: str) -> None:
    model = network()
    x, y = batch(loss)
    exact = measure(model, x, y, loss, "exact")
    draws = [measure(model, x, y, loss, "sampled", seed=seed) for seed in range(150)]
    for name, P in exact.items():
        lefts = torch.stack([draw[name].left for draw in draws])
        error = lefts.std(dim=0) / len(draws) ** 0.5
        assert float((lefts.mean(dim=0) - P.left).norm()) < 3 * float(error.norm())
        assert float(error.norm()) < 0.3 * float(P.left.norm()), "too few draws to tell anything"


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(2, 4, 3, stride=2, padding=1), (2, 9)),
    "conv1d, groups": (nn.Conv1d(4, 4, 3, groups=2), (4, 6)),
    "conv2d, depthwise": (nn.Conv2d(3, 6, 2, groups=3, bias=False), (3, 4, 4)),
    "conv2d, dilation": (nn.Conv2d(2, 3, 2, dilation=2), (2, 5, 5)),
    "conv3d": (nn.Conv3d(1, 2, 2), (1, 3, 3, 3)),
    "linear over a sequence": (nn.Linear(3, 4), (5, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_left_factor_is_the_sum_over_examples_and_positions(name: str) -> None:
    """G = Σ b bᵀ / m with b the gradient of an example's own loss by the layer's output at a position."""
    layer, shape = LAYERS[name]
    torch.manual_seed(1)
    x = torch.randn(4, *shape, dtype=torch.float64)
    layer = layer.double()
    head = nn.Linear(layer(x)[0].numel(), 3).double()
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), head)
    y = torch.tensor([0, 1, 2, 1])
    found = measure(model, x, y, "cross-entropy", "empirical")["0"]
    groups = getattr(layer, "groups", 1)
    sums = torch.zeros(groups, *found.left.shape[-2:]).double()
    for example, label in zip(x, y, strict=True):
        output = layer(example[None]).detach().requires_grad_()
        F.cross_entropy(head(torch.tanh(output).flatten(1)), label[None]).backward()  # type: ignore[no-untyped-call]
        assert output.grad is not None
        positions = output.grad[0] if isinstance(layer, nn.Linear) else output.grad[0].flatten(1).T
        b = positions.reshape(len(positions), groups, -1).movedim(1, 0)
        sums += b.mT @ b
    torch.testing.assert_close(found.left.reshape(sums.shape), sums / len(x))


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


def test_outputs_with_positions_count_every_position_as_an_example() -> None:
    torch.manual_seed(2)
    linear = nn.Linear(3, 4).double()
    x, y = torch.randn(5, 6, 3, dtype=torch.float64), torch.randint(0, 4, (5, 6))
    sequence = nn.Sequential(linear, Transposed())
    one = measure(sequence, x, y, "cross-entropy", "exact")["0"]
    two = measure(nn.Sequential(linear), x.flatten(0, 1), y.flatten(), "cross-entropy", "exact")["0"]
    torch.testing.assert_close(one.left, two.left)
    torch.testing.assert_close(one.right, two.right)


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
    F.cross_entropy(plain(x), y).backward()  # type: ignore[no-untyped-call]
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
