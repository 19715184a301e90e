"""Each optimizer's step against its formula, and what is asked of some of them only."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedpm_flwr.curvature import CurvatureError, Diagonal, LayerCurvature, to_matrix
from fedpm_flwr.optim import FOOF, KFAC, LTDA, Newton, Sophia

from .test_optim import OPTIMIZERS, Make, data, network, step, vector

pytestmark = pytest.mark.filterwarnings("ignore:no curvature for (network.)?norm")


@pytest.mark.parametrize("make", [OPTIMIZERS["foof"], OPTIMIZERS["kfac"]], ids=["foof", "kfac"])
def test_parameters_without_curvature_have_a_learning_rate_of_their_own(make: Make) -> None:
    model = network()
    norm = model.norm
    optimizer = make(model, lr=0.1, plain_lr=0.4)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    for rate in (0.4, 0.2):
        before = norm.weight.detach().clone()
        step(model, optimizer)
        assert norm.weight.grad is not None
        torch.testing.assert_close(norm.weight.detach(), before - rate * norm.weight.grad)
        scheduler.step()


def test_coupled_weight_decay_is_part_of_the_gradient() -> None:
    model = nn.Linear(4, 3).double()
    optimizer = FOOF(model, lr=1.0, damping=0.1, weight_decay=0.5)
    before = to_matrix([model.weight.detach().clone(), model.bias.detach().clone()])
    step(model, optimizer)
    (said,) = optimizer.preconditioners()
    assert model.weight.grad is not None
    assert model.bias.grad is not None
    gradient = to_matrix([model.weight.grad, model.bias.grad]) + 0.5 * before
    expected = before - said.curvature.damped(0.1).solve(gradient)
    torch.testing.assert_close(to_matrix([model.weight.detach(), model.bias.detach()]), expected)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("make", [OPTIMIZERS["foof"], OPTIMIZERS["newton"]], ids=["foof", "newton"])
def test_relative_damping_is_in_units_of_the_mean_eigenvalue(make: Make, scale: float) -> None:
    model = nn.Linear(4, 3).double()
    optimizer = make(model, damping=0.2, relative_damping=True)
    step(model, optimizer, (scale * data()[0], data()[1]))
    (said,) = optimizer.preconditioners()
    assert said.damping == pytest.approx(0.2 * float(said.curvature.diagonal(3, 5).mean()))


def test_relative_damping_of_inputs_that_are_all_0_is_absolute() -> None:
    model = nn.Linear(4, 3, bias=False).double()
    optimizer = FOOF(model, damping=0.2, relative_damping=True)
    step(model, optimizer, (torch.zeros(5, 4, dtype=torch.float64), data(5)[1]))
    assert optimizer.preconditioners()[0].damping == 0.2


@pytest.mark.parametrize("make", [OPTIMIZERS["ltda"], OPTIMIZERS["newton"]], ids=["ltda", "newton"])
def test_a_loop_that_does_not_measure_is_told_once(make: Make) -> None:
    model = network()
    optimizer = make(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            F.cross_entropy(model(data()[0]), data()[1]).backward()
            optimizer.step()
    said = [str(warning.message) for warning in caught if "was not measured" in str(warning.message)]
    assert len(said) == len(set(said)) > 0
    assert "optimizer.measure(loss) not called before loss.backward()" in said[0]
    assert {w.filename for w in caught if "was not measured" in str(w.message)} == {__file__}


def stale_warnings(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(warning.message) for warning in caught if "was not measured anew" in str(warning.message)]


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_loop_that_stops_measuring_is_told_once(make: Make, interval: int) -> None:
    """After a validation the model stays in evaluation mode, and nothing is given to ``measure`` any more."""
    model = network()
    optimizer = make(model, refresh_interval=interval)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(interval + 1):  # up to one that measures, and it
            step(model, optimizer)
        model.eval()
        said = []
        for _ in range(2 * interval):
            optimizer.zero_grad()
            F.cross_entropy(model(data()[0]), data()[1]).backward()
            optimizer.step()
            said.append(len(stale_warnings(caught)))
    assert said == [0] * (interval - 1) + [1] * (interval + 1)  # when it is due, and no more
    assert {w.filename for w in caught if "measured anew" in str(w.message)} == {__file__}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_steps_that_measure_once_and_layers_without_a_part_in_a_step_are_not_stale(make: Make) -> None:
    """Several backward passes of which one is measured, steps that a scaler skips, layers that are not used."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.other, self.uses_other = network(), nn.Linear(4, 3).double(), True

        def forward(self, x: Tensor) -> Tensor:
            outputs: Tensor = self.network(x)
            return outputs + self.other(x) if self.uses_other else outputs

    model = Both()
    optimizer = make(model, refresh_interval=1)
    steps = ((True, True, 1.0), (False, False, 1.0), (False, True, torch.inf), (False, True, 1.0))
    scaler = torch.amp.GradScaler("cpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for model.uses_other, to_none, overflow in steps:
            optimizer.zero_grad(set_to_none=to_none)
            outputs = model(data()[0])
            loss = F.cross_entropy(outputs, data()[1])
            optimizer.measure(loss, outputs)
            scaler.scale(overflow * loss / 2).backward()
            model.eval()
            scaler.scale(F.cross_entropy(model(data()[0]), data()[1]) / 2).backward()
            model.train()
            scaler.step(optimizer)
            scaler.update()
    assert stale_warnings(caught) == []


def test_after_detach_old_curvature_is_meant() -> None:
    model = network()
    optimizer = FOOF(model, refresh_interval=1)
    step(model, optimizer)
    optimizer.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer)


def test_newton_reaches_the_minimum_of_a_quadratic_in_one_step() -> None:
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.randn(20, 3, dtype=torch.float64)
    model = nn.Linear(4, 3).double()
    for matrix in ("hessian", "ggn"):
        nn.init.normal_(model.weight)
        optimizer = Newton(model, matrix=matrix)
        outputs = model(x)
        loss = F.mse_loss(outputs, y)
        optimizer.measure(loss, outputs)
        loss.backward()
        optimizer.step()
        solution = torch.linalg.lstsq(torch.cat([x, torch.ones(20, 1).double()], dim=1), y).solution.T
        torch.testing.assert_close(to_matrix([model.weight.detach(), model.bias.detach()]), solution)
        optimizer.zero_grad()


def test_newton_goes_downhill_where_the_hessian_is_indefinite() -> None:
    class Saddle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0, 0.5], dtype=torch.float64))

        def forward(self) -> Tensor:
            return self.w[0] ** 2 - 3 * self.w[1] ** 2

    model = Saddle()
    optimizer = Newton(model, damping=1e-6)
    loss = model()
    optimizer.measure(loss)
    loss.backward()
    optimizer.step()
    torch.testing.assert_close(model.w.detach(), torch.tensor([0.0, 1.0], dtype=torch.float64), atol=1e-5, rtol=0)


def test_newton_steps_the_others_where_a_parameter_is_not_used() -> None:
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.randn(20, 1, dtype=torch.float64)
    used, unused = nn.Linear(4, 1, bias=False).double(), nn.Linear(2, 2).double()
    optimizer = Newton(nn.ModuleList([used, unused]), damping=1e-12)
    idle = unused.weight.clone()
    loss = F.mse_loss(used(x), y)
    optimizer.measure(loss)
    loss.backward()
    optimizer.step()
    torch.testing.assert_close(used.weight.detach(), torch.linalg.lstsq(x, y).solution.T)
    assert torch.equal(unused.weight, idle)


def test_newton_with_coupled_weight_decay_reaches_the_regularised_minimum() -> None:
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.randn(20, 1, dtype=torch.float64)
    model = nn.Linear(4, 1, bias=False).double()
    optimizer = Newton(model, weight_decay=0.5)
    loss = 0.5 * (model(x) - y).square().mean()
    optimizer.measure(loss)
    loss.backward()
    optimizer.step()
    solution = torch.linalg.solve(x.T @ x / 20 + 0.5 * torch.eye(4).double(), x.T @ y / 20)
    torch.testing.assert_close(model.weight.detach(), solution.T)
    assert optimizer.preconditioners()[0].damping == 0.5


class Coupled(nn.Module):
    """Of Hessian [[0.1, 1], [1, 0.1]]: single draws of Hutchinson's diagonal are 1.1 or −0.9."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self) -> Tensor:
        return 0.05 * self.w.square().sum() + self.w[0] * self.w[1]


def test_signs_are_averaged_before_they_are_made_positive() -> None:
    model = Coupled()
    optimizer = Sophia(model, lr=0.0, estimator="hutchinson", gamma=1.0, betas=(0.9, 0.999), refresh_interval=1)
    for _ in range(1000):
        loss = model()
        optimizer.measure(loss)
        loss.backward()
        optimizer.step()
    (said,) = optimizer.preconditioners()
    expected = torch.full((2, 1), 0.1, dtype=torch.float64)
    torch.testing.assert_close(said.curvature.parts()["values"], expected, atol=0.1, rtol=0)


def test_what_sophia_tells_does_not_grow_with_the_number_of_steps() -> None:
    sizes = []
    for steps in (1, 200):
        model = network()
        optimizer = Sophia(model, lr=0.0, refresh_interval=1)
        for _ in range(steps):
            step(model, optimizer)
        sizes.append(sum(float(layer.curvature.parts()["values"].sum()) for layer in optimizer.preconditioners()))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.5)


@pytest.mark.parametrize("make", [OPTIMIZERS["kfac"], OPTIMIZERS["sophia"]], ids=["kfac", "sophia"])
def test_outputs_that_are_not_finite_raise_nothing_in_the_forward_pass(make: Make) -> None:
    model = network()
    optimizer = make(model, refresh_interval=1)
    step(model, optimizer)
    model(torch.full((3, 4), torch.nan, dtype=torch.float64))
    step(model, optimizer)
    assert torch.isfinite(vector(model)).all()


def test_kfac_leaves_out_layers_with_too_many_outputs() -> None:
    model = nn.Sequential(nn.Linear(4, 20), nn.Linear(20, 4), nn.Conv1d(4, 16, 1, groups=2))
    with pytest.warns(UserWarning, match=r"0 \(20 outputs, more than 16\), 1 \(21 inputs, more than 16\)"):
        optimizer = KFAC(model, max_factor_side=16)
    assert [block.name for block in optimizer._estimator.blocks] == ["2"]


def test_a_group_has_its_own_plain_learning_rate() -> None:
    model = network()
    groups: list[dict[str, Any]] = [
        {"params": [*model.body.parameters(), *model.head.parameters()]},
        {"params": model.norm.parameters(), "lr": 0.2, "plain_lr": 0.05},
    ]
    optimizer = FOOF(model, groups, lr=0.1, plain_lr=0.3)
    before = model.norm.weight.detach().clone()
    step(model, optimizer)
    assert model.norm.weight.grad is not None
    torch.testing.assert_close(model.norm.weight.detach(), before - 0.05 * model.norm.weight.grad)


def test_newton_of_a_large_model_is_refused() -> None:
    with pytest.raises(ValueError, match="an exact matrix of 10100 parameters, more than 8192"):
        Newton(nn.Linear(100, 100))


def gauss_newton_blocks(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    """Of each layer of a network with squared loss, Jᵀ(2/classes)J / m by torch.func, on vec of [W | b]."""
    parameters = {key: p.detach() for key, p in model.named_parameters()}

    def outputs(joint: Tensor, name: str) -> Tensor:
        own = {f"{name}.weight": joint[:, :-1], f"{name}.bias": joint[:, -1]}
        found: Tensor = torch.func.functional_call(model, parameters | own, (x,))
        return found

    blocks = []
    for name in ("0", "1", "2"):
        joint = to_matrix([parameters[f"{name}.weight"], parameters[f"{name}.bias"]])
        jacobian = torch.func.jacrev(outputs)(joint, name).flatten(0, 1).flatten(1)
        blocks.append(2 / 4 * jacobian.T @ jacobian / len(x))
    return blocks


def test_kfac_on_a_deep_linear_network_is_the_gauss_newton_step_of_each_layer() -> None:
    """Exact factors, squared loss, no damping (Bernacchia et al. 2018): to rounding."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 3), nn.Linear(3, 4)).double()
    x, y = torch.randn(30, 5, dtype=torch.float64), torch.randn(30, 4, dtype=torch.float64)
    blocks = gauss_newton_blocks(model, x)
    optimizer = KFAC(model, fisher="exact", loss="mse", lr=1.0, damping=0.0)
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    before = [to_matrix([layer.weight.detach().clone(), layer.bias.detach().clone()]) for layer in layers]
    F.mse_loss(model(x), y).backward()
    optimizer.step()
    for layer, start, block, said in zip(layers, before, blocks, optimizer.preconditioners(), strict=True):
        torch.testing.assert_close(said.curvature.to_dense(len(block)), block)
        assert layer.weight.grad is not None
        assert layer.bias.grad is not None
        gradient = to_matrix([layer.weight.grad, layer.bias.grad])
        expected = start - torch.linalg.solve(block, gradient.flatten()).reshape(start.shape)
        after = to_matrix([layer.weight.detach(), layer.bias.detach()])
        torch.testing.assert_close(after, expected, rtol=1e-6, atol=1e-8)


def test_sampled_kfac_factors_are_the_exact_ones_within_three_standard_errors() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 3), nn.Linear(3, 4)).double()
    x = torch.randn(30, 5, dtype=torch.float64)
    blocks = gauss_newton_blocks(model, x)
    draws: list[list[Tensor]] = [[] for _ in blocks]
    optimizer = KFAC(model, loss="mse", lr=0.0, ema=0.0, refresh_interval=1, inverse_interval=1000)
    for _ in range(200):
        F.mse_loss(model(x), torch.zeros(30, 4).double()).backward()
        optimizer.step()
        for found, said in zip(draws, optimizer.preconditioners(), strict=True):
            found.append(said.curvature.to_dense(len(said.curvature.diagonal(*_shape(said)).flatten())))
    for found, block in zip(draws, blocks, strict=True):
        stacked = torch.stack(found)
        standard_error = stacked.std(dim=0) / len(found) ** 0.5
        off = ((stacked.mean(dim=0) - block) / standard_error).abs()
        assert float(off.square().mean()) ** 0.5 < 1.5
        assert float((stacked.mean(dim=0) - block).norm()) < 3 * float(standard_error.norm())


def _shape(layer: LayerCurvature) -> tuple[int, int]:
    parts = layer.curvature.parts()
    return len(parts["left"]), len(parts["right"])


def test_sophia_matches_its_algorithm_by_hand() -> None:
    """Algorithm 3 with Algorithm 2's estimator: the targets drawn here by the same generator."""
    model = nn.Linear(3, 2, bias=False).double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1, 0])
    optimizer = Sophia(
        model, lr=0.1, betas=(0.9, 0.7), gamma=0.5, eps=1e-3, refresh_interval=2, weight_decay=0.01, seed=5
    )
    generator = torch.Generator().manual_seed(5)
    theta, m, h = model.weight.detach().clone(), torch.zeros(2, 3).double(), torch.zeros(2, 3).double()
    for t in range(5):
        p = (x @ theta.T).softmax(dim=1)
        if t % 2 == 0:
            clocks = torch.empty_like(p).exponential_(generator=generator)
            drawn = F.one_hot((p / clocks).argmax(dim=1), 2)
            estimate = (p - drawn).T @ x / 6
            h = 0.7 * h + 0.3 * 6 * estimate**2
        gradient = (p - F.one_hot(y, 2)).T @ x / 6
        m = 0.9 * m + 0.1 * gradient
        theta = theta - 0.1 * 0.01 * theta
        theta = theta - 0.1 * (m / (0.5 * h).clamp(min=1e-3)).clamp(-1, 1)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        torch.testing.assert_close(model.weight.detach(), theta)
    (said,) = optimizer.preconditioners()
    assert isinstance(said.curvature, Diagonal)
    torch.testing.assert_close(said.curvature.values, (0.5 * h / (1 - 0.7**3)).clamp(min=1e-3))
    assert said.damping == 0


def test_ltda_matches_its_formula_by_hand() -> None:
    """Least squares with one output: H = XᵀX · 2/n, so v is its first row."""
    model = nn.Linear(3, 1, bias=False).double()
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 1, dtype=torch.float64)
    optimizer = LTDA(model, lr=0.1, damping=0.5)
    theta = model.weight.detach().clone()
    v = (2 / 8 * x.T @ x)[0]
    for _ in range(3):
        gradient = 2 / 8 * (x @ theta.T - y).T @ x
        theta = theta - 0.1 * gradient / (v**2 / v[0] + 0.5)
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        optimizer.measure(loss)
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(model.weight.detach(), theta)


@pytest.mark.parametrize(
    "misuse",
    [
        lambda: FOOF(network(), position_stride=0),
        lambda: KFAC(network(), position_stride=0),
        lambda: KFAC(network(), fisher="true"),
        lambda: KFAC(network(), loss="hinge"),
        lambda: Sophia(network(), loss="hinge"),
        lambda: Sophia(network(), estimator="exact"),
        lambda: Sophia(network(), gamma=0.0),
        lambda: Sophia(network(), betas=(0.9, 1.0)),
        lambda: Newton(network(), matrix="fisher"),
        lambda: LTDA(network(), damping=-1.0),
        lambda: FOOF(network(), clip=-1.0),
        lambda: FOOF(network(), momentum=-0.1),
        lambda: FOOF(network(), weight_decay=-0.1),
        lambda: FOOF(network(), plain_lr=-0.1),
    ],
)
def test_arguments_out_of_range(misuse: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"must be|unknown|allowed"):
        misuse()


def test_newton_without_damping_on_a_singular_hessian_says_so() -> None:
    model = nn.Linear(4, 3).double()  # softmax regression: adding the same to all classes changes nothing
    with pytest.raises(CurvatureError, match=r"layer 'model': .* is not positive definite, and its damping is 0"):
        step(model, Newton(model))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("make", [OPTIMIZERS[name] for name in ("foof", "kfac", "sophia")])
def test_a_step_on_cuda_does_not_wait_for_the_device(make: Make) -> None:
    """But for inversions; also where factors are measured."""
    model = network().cuda()
    optimizer = make(model, refresh_interval=2)
    batch = (data()[0].cuda(), data()[1].cuda())
    step(model, optimizer, batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(model(batch[0]), batch[1]).backward()
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
