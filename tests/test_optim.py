"""What holds for every second-order optimizer. Each one's own step is in test_optimizer_steps.py."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedpm_flwr.curvature import to_matrix
from fedpm_flwr.optim import FOOF, KFAC, LTDA, Newton, SecondOrder, Sophia
from fedpm_flwr.wire import decode, encode

Make = Callable[..., SecondOrder]

OPTIMIZERS: dict[str, Make] = {
    "foof": lambda model, *a, **o: FOOF(model, *a, **{"damping": 0.1, **o}),
    "kfac": lambda model, *a, **o: KFAC(model, *a, **{"damping": 0.1, **o}),
    "sophia": lambda model, *a, **o: Sophia(model, *a, **{"lr": 0.01, "gamma": 10.0, **o}),
    "sophia-hutchinson": lambda model, *a, **o: Sophia(
        model, *a, **{"lr": 0.01, "gamma": 10.0, "estimator": "hutchinson", **o}
    ),
    "ltda": lambda model, *a, **o: LTDA(model, *a, **{"damping": 1.0, **o}),
    "newton": lambda model, *a, **o: Newton(model, *a, **{"lr": 0.5, "damping": 0.1, **o}),
    "newton-ggn": lambda model, *a, **o: Newton(model, *a, **{"lr": 0.5, "damping": 0.1, "matrix": "ggn", **o}),
}


class Network(nn.Module):
    """Two layers with curvature, and a norm without, but for diagonal methods."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.norm(torch.tanh(self.body(x))))
        return outputs


def network(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network().double()


def is_sophia(make: Make) -> bool:
    """Which has its own running averages and intervals."""
    return isinstance(make(network()), Sophia)


def data(examples: int = 12, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 4, dtype=torch.float64, generator=generator)
    return x, x[:, :3].argmax(dim=1)


def step(model: nn.Module, optimizer: SecondOrder, batch: tuple[Tensor, Tensor] | None = None) -> float:
    x, y = batch or data()
    optimizer.zero_grad()
    outputs = model(x)
    loss = F.cross_entropy(outputs, y)
    optimizer.measure(loss, outputs)
    loss.backward()
    optimizer.step()
    return float(loss)


def vector(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


pytestmark = pytest.mark.filterwarnings("ignore:no curvature for norm")


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
class TestEvery:
    def test_it_minimises(self, make: Make) -> None:
        model = network()
        optimizer = make(model)
        losses = [step(model, optimizer) for _ in range(60)]
        assert losses[-1] < 0.5 * losses[0]

    def test_what_it_says_travels_and_is_positive_definite(self, make: Make) -> None:
        model = network()
        optimizer = make(model)
        for _ in range(2):
            step(model, optimizer)
        said = optimizer.preconditioners()
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        for found, layer in zip(decode(encode(said, "triangle-float64"), shapes), said, strict=True):
            assert (found.block, found.damping, found.curvature.kind) == (
                layer.block,
                layer.damping,
                layer.curvature.kind,
            )
            found.curvature.damped(found.damping).check_positive_definite()

    def test_the_step_is_by_what_it_says(self, make: Make) -> None:
        """θ moves by −η P⁻¹g with the P and λ that are told; of Sophia, by its clipped momentum."""
        model = network()
        optimizer = make(model)
        before = {key: value.clone() for key, value in model.named_parameters()}
        step(model, optimizer)
        gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        lr = optimizer.param_groups[0]["lr"]
        told = optimizer.preconditioners()
        assert told
        for layer in told:
            gradient = to_matrix([gradients.pop(key) for key in layer.block.parameters])
            after = to_matrix([dict(model.named_parameters())[key] for key in layer.block.parameters])
            start = to_matrix([before[key] for key in layer.block.parameters])
            if isinstance(optimizer, Sophia):
                # h counts in the step by 1 − β₂ = 0.01 of what is told, where it does not start at 0.
                expected = layer.curvature.scaled(0.01).solve(0.035 * gradient).clamp(-1, 1)
            else:
                expected = layer.curvature.damped(layer.damping).solve(gradient)
            torch.testing.assert_close(after, start - lr * expected)
        for key, gradient in gradients.items():  # and the rest by their plain gradients
            torch.testing.assert_close(dict(model.named_parameters())[key], before[key] - lr * gradient)

    def test_state_dict_round_trip_through_a_file(self, make: Make) -> None:
        """Saved, read with ``weights_only`` and loaded, it goes on as if nothing had happened."""
        first = network()
        options = {"momentum": 0.5, "refresh_interval": 2} | ({} if is_sophia(make) else {"inverse_interval": 3})
        one = make(first, **options)
        for _ in range(3):
            step(first, one)
        buffer = io.BytesIO()
        torch.save(one.state_dict(), buffer)
        buffer.seek(0)
        second = copy.deepcopy(first)
        two = make(second, **options)
        two.load_state_dict(torch.load(buffer, weights_only=True))
        generators = [getattr(o._estimator, "_generator", None) for o in (one, two)]
        if generators[0] is not None:  # both draw the same targets from here
            for optimizer in (one, two):
                vars(optimizer._estimator)["_generator"] = torch.Generator().manual_seed(3)
        for _ in range(4):
            assert step(first, one) == step(second, two)
        assert torch.equal(vector(first), vector(second))

    @pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps])
    def test_copies_are_refused(self, make: Make, how: Callable[[object], object]) -> None:
        """They would not watch a model: the hooks stay with the optimizer that was made with it."""
        optimizer = make(network())
        with pytest.raises(
            TypeError, match=f"{type(optimizer).__name__} cannot be copied or pickled: .* Make another"
        ):
            how(optimizer)

    def test_curvature_keeps_its_precision_in_a_half_precision_model(self, make: Make) -> None:
        model = network().bfloat16()
        optimizer = make(model)
        batch = (data()[0].bfloat16(), data()[1])
        for _ in range(2):
            step(model, optimizer, batch)
        before = [layer.curvature.parts() for layer in optimizer.preconditioners()]
        optimizer.load_state_dict(optimizer.state_dict())
        for old, layer in zip(before, optimizer.preconditioners(), strict=True):
            for name, part in layer.curvature.parts().items():
                assert part.dtype == torch.float32
                assert torch.equal(part, old[name])

    def test_param_groups_schedulers_and_closures(self, make: Make) -> None:
        model = network()
        groups: list[dict[str, Any]] = [
            {"params": [p for p in model.parameters() if p.ndim > 1]},
            {"params": [p for p in model.parameters() if p.ndim == 1], "lr": 0.0},
        ]
        optimizer = make(model, groups)
        rate = optimizer.param_groups[0]["lr"]
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        bias, weight = model.body.bias.clone(), model.body.weight.clone()
        x, y = data()

        def closure() -> float:
            optimizer.zero_grad()
            loss = F.cross_entropy(outputs := model(x), y)
            optimizer.measure(loss, outputs)
            loss.backward()
            return float(loss)

        assert optimizer.step(closure) > 0
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == 0.5 * rate
        assert torch.equal(model.body.bias, bias)
        assert not torch.equal(model.body.weight, weight)

    def test_gradient_accumulation_measures_both_halves(self, make: Make) -> None:
        model = network()
        optimizer = make(model)
        (x, y), other = data(6, seed=3), data(6, seed=4)
        for inputs, targets in ((x, y), other):
            outputs = model(inputs)
            loss = F.cross_entropy(outputs, targets)
            optimizer.measure(loss, outputs)
            (loss / 2).backward()
        optimizer.step()
        if isinstance(optimizer, FOOF | Newton):  # the others' measurements are random, or not linear in the loss
            twin = network()
            whole = make(twin)
            step(twin, whole, (torch.cat([x, other[0]]), torch.cat([y, other[1]])))
            torch.testing.assert_close(vector(model), vector(twin))
        assert torch.isfinite(vector(model)).all()

    def test_autocast_leaves_factors_in_float32(self, make: Make) -> None:
        model = network().float()
        optimizer = make(model)
        x, y = data()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model(x.float())
            loss = F.cross_entropy(outputs, y)
        optimizer.measure(loss, outputs)
        loss.backward()
        optimizer.step()
        parts = [part for layer in optimizer.preconditioners() for part in layer.curvature.parts().values()]
        assert parts
        assert {part.dtype for part in parts} == {torch.float32}

    def test_a_compiled_model_takes_the_same_steps(self, make: Make) -> None:
        plain, inner = network(), network()
        compiled: Any = torch.compile(inner, backend="eager")  # called like a module
        one, two = make(plain), make(compiled)
        for _ in range(3):
            step(plain, one)
            step(compiled, two)
        torch.testing.assert_close(vector(inner), vector(plain))
        assert [layer.block for layer in two.preconditioners()] == [layer.block for layer in one.preconditioners()]
        torch.compiler.reset()

    def test_momentum_adds_up_updates(self, make: Make) -> None:
        """With η = 0 in between nothing else changes: two equal updates make 1 and 1 + μ of it."""
        model = network()
        options = {} if is_sophia(make) else {"refresh_interval": 100}
        optimizer = make(model, momentum=0.25, **options)
        rate = optimizer.param_groups[0]["lr"]
        optimizer.param_groups[0]["lr"] = 0.0
        start = vector(model)
        step(model, optimizer)
        assert torch.equal(vector(model), start)
        first = torch.cat([optimizer.state[p]["momentum"].flatten() for p in model.parameters()]).clone()
        optimizer.param_groups[0]["lr"] = rate
        step(model, optimizer)
        second = torch.cat([optimizer.state[p]["momentum"].flatten() for p in model.parameters()])
        torch.testing.assert_close(vector(model), start - rate * second)
        if options:
            torch.testing.assert_close(second, 1.25 * first)

    def test_the_update_of_all_parameters_is_clipped_to_a_norm(self, make: Make) -> None:
        lengths = []
        for clip in (0.0, 1e-2, 1e3):
            model = network()
            before = vector(model)
            optimizer = make(model, clip=clip)
            step(model, optimizer)
            lengths.append(float((vector(model) - before).norm()) / optimizer.param_groups[0]["lr"])
        assert lengths[0] == pytest.approx(lengths[2])
        assert lengths[1] == pytest.approx(1e-2)

    def test_decoupled_weight_decay_shrinks_the_parameters_apart(self, make: Make) -> None:
        decoupled = {} if is_sophia(make) else {"decoupled_weight_decay": True}
        moved = []
        for decay in (0.0, 0.5):
            model = network()
            before = vector(model)
            optimizer = make(model, weight_decay=decay, **decoupled)
            step(model, optimizer)
            moved.append(vector(model) - before)
        torch.testing.assert_close(moved[1], moved[0] - optimizer.param_groups[0]["lr"] * 0.5 * before)

    def test_the_hooks_go_with_the_optimizer(self, make: Make) -> None:
        model = network()
        optimizer = make(model)
        step(model, optimizer)
        del optimizer
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    def test_no_batch_and_one_example(self, make: Make) -> None:
        model = network()
        optimizer = make(model)
        model(torch.zeros(0, 4, dtype=torch.float64))
        step(model, optimizer, data(1))
        assert torch.isfinite(vector(model)).all()
        assert optimizer.preconditioners()

    def test_with_a_codec_it_steps_by_what_arrives(self, make: Make) -> None:
        model = network()
        optimizer = make(model, codec="triangle-float32")
        step(model, optimizer)
        for layer in optimizer.preconditioners():
            for part in layer.curvature.parts().values():
                if not isinstance(optimizer, Sophia):
                    assert torch.equal(part, part.float().double())
