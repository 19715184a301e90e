"""FedPM with momentum or Adam on the server: what Flower's are to FedAvg, these are to FedPM."""

import copy
import logging
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi, Strategy
from torch import Tensor, nn

from fedpm_flwr import messages
from fedpm_flwr.checkpointed import Checkpointed
from fedpm_flwr.guarded import FailedRoundsError
from fedpm_flwr.rivals.fedadam import GuardedFedAdam
from fedpm_flwr.server_optimizers import FedPMAdagrad, FedPMAdam, FedPMAvgM, FedPMYogi
from fedpm_flwr.strategy import FedPM

from .apps import federate, ordered, regression_client, reply_with, tell_partitions

State = dict[str, Tensor]
CLIENTS, ROUNDS = 3, 4
ADAPTIVE = {FedPMAdagrad: FedAdagrad, FedPMAdam: FedAdam, FedPMYogi: FedYogi}
pytestmark = pytest.mark.filterwarnings("ignore:no curvature for")


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(2, 2).double()


def data(partition: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(partition)
    x = torch.randn(5 + partition, 2, dtype=torch.float64, generator=generator) * (1 + partition)
    return x, x @ torch.tensor([[1.0, -1.0], [0.5, 2.0]], dtype=torch.float64) + partition


def client() -> ClientApp:
    return regression_client(data, make_model, lr=0.5, damping=0.1)


def plain_client(make: Callable[[], nn.Module] = make_model) -> ClientApp:
    """Moves its model a part of the way to a place of its own; no curvature."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition = messages.partition_of(context)[0]
        old = message.content.array_records[messages.ARRAYS].to_torch_state_dict()
        new = {key: value + 0.3 * (partition - value) for key, value in old.items()}
        return reply_with(message, ArrayRecord(new), {"num-examples": 1 + partition, "loss": float(partition)})

    tell_partitions(app)
    return app


def models(app: ClientApp, strategy: Strategy, rounds: int = ROUNDS, **more: Any) -> list[State]:
    """θ after 0, 1, … rounds."""
    passed: list[State] = []
    watching = ClientApp()

    @watching.train()
    def train(message: Message, context: Context) -> Message:
        number = messages.server_round_of(message)
        if len(passed) < number:
            passed.append(dict(message.content.array_records[messages.ARRAYS].to_torch_state_dict()))
        return app(message, context)

    tell_partitions(watching)
    result = federate(watching, strategy, make_model(), CLIENTS, rounds, wrap=ordered, **more)
    return [*passed, dict(result.arrays.to_torch_state_dict())]


def same(found: State, expected: State) -> None:
    assert set(found) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-11, atol=1e-13)


def options(**more: Any) -> dict[str, Any]:
    return {"fraction_evaluate": 0.0, **more}


def test_without_momentum_it_is_fedpm_to_the_bit() -> None:
    for rate in (1.0, 0.5):
        fedpm = FedPM(**options(codec="triangle-float64", server_learning_rate=rate))
        found = FedPMAvgM(**options(codec="triangle-float64", server_learning_rate=rate, server_momentum=0.0))
        for one, other in zip(models(client(), fedpm), models(client(), found), strict=True):
            assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_clients_without_curvature_make_it_flowers_fedavgm(rate: float) -> None:
    stock = models(plain_client(), FedAvgM(**options(server_momentum=0.7, server_learning_rate=rate)))
    found = models(plain_client(), FedPMAvgM(**options(server_momentum=0.7, server_learning_rate=rate)))
    for one, other in zip(stock, found, strict=True):
        same(other, one)
    plain = models(plain_client(), FedAvg(**options()))
    assert not torch.allclose(found[-1]["weight"], plain[-1]["weight"])


@pytest.mark.parametrize("make", ADAPTIVE)
def test_clients_without_curvature_make_it_flowers_adaptive_strategies(make: Any) -> None:
    settings = options(eta=0.2, beta_1=0.8) if make is not FedPMAdagrad else options(eta=0.2)
    stock, found = ADAPTIVE[make](**settings), make(**settings)
    for one, other in zip(models(plain_client(), stock), models(plain_client(), found), strict=True):
        same(other, one)


def test_momentum_of_mixed_steps_by_hand() -> None:
    """v⁺ = μ v + (mix(θ) − θ), θ⁺ = θ + v⁺, with mix(θ) what FedPM makes of θ in one round."""
    found = models(client(), FedPMAvgM(**options(codec="triangle-float64", server_momentum=0.6)))
    velocity = {key: torch.zeros_like(value) for key, value in found[0].items()}
    for before, after in pairwise(found):
        mixed = mixed_from(before)
        velocity = {key: 0.6 * velocity[key] + mixed[key] - before[key] for key in before}
        same(after, {key: before[key] + velocity[key] for key in before})


def test_adams_first_step_by_hand() -> None:
    """Flower's bias correction in round 1 is by β², where m = (1 − β₁)Δ and v = (1 − β₂)Δ²."""
    strategy = FedPMAdam(**options(codec="triangle-float64", eta=0.1, beta_1=0.9, beta_2=0.99, tau=1e-3))
    before, after = models(client(), strategy, rounds=1)
    length = 0.1 * (1 - 0.99**2) ** 0.5 / (1 - 0.9**2)
    mixed = mixed_from(before)
    for key, value in before.items():
        delta = mixed[key] - value
        same({key: after[key]}, {key: value + length * 0.1 * delta / (0.1 * delta.abs() + 1e-3)})


def mixed_from(theta: State) -> State:
    model = make_model()
    model.load_state_dict(theta)
    strategy = FedPM(**options(codec="triangle-float64"))
    return dict(federate(client(), strategy, model, CLIENTS, wrap=ordered).arrays.to_torch_state_dict())


@pytest.mark.parametrize(
    "make",
    [
        lambda: FedPMAvgM(**options(server_momentum=0.6)),
        lambda: FedPMAdam(**options()),
        lambda: FedPMYogi(**options()),
    ],
)
def test_a_run_that_is_taken_up_again_ends_at_the_same_bits(make: Callable[[], FedPM], tmp_path: Path) -> None:
    whole = models(client(), Checkpointed(make(), tmp_path / "whole"))
    models(client(), Checkpointed(make(), tmp_path / "broken"), rounds=2)
    taken_up = Checkpointed(make(), tmp_path / "broken", resume=tmp_path / "broken")
    result = federate(client(), taken_up, make_model(), CLIENTS, ROUNDS, wrap=ordered)
    for key, value in result.arrays.to_torch_state_dict().items():
        assert torch.equal(value, whole[-1][key])


def test_a_failed_round_leaves_no_momentum() -> None:
    """Round 2 has too few replies: rounds 1 and 3 are then as rounds 1 and 2 without it."""
    good, app = client(), ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if messages.server_round_of(message) == 2 and messages.partition_of(context)[0] == 0:
            raise RuntimeError("nothing from here")
        return good(message, context)

    tell_partitions(app)
    strategy = FedPMAvgM(**options(server_momentum=0.6, min_replies=3))
    found = models(app, strategy, rounds=3)
    expected = models(client(), FedPMAvgM(**options(server_momentum=0.6)), rounds=2)
    same(found[-1], expected[-1])  # but for the order in which clients are added up


def test_a_step_that_is_not_finite_is_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(FailedRoundsError, match="no round gave a new model"):
        federate(plain_client(), FedPMAdam(**options(eta=1e300)), make_model().float(), CLIENTS)
    assert "the aggregated 'weight' is not finite: the model stays as it was" in caplog.text


@pytest.mark.parametrize("make", [lambda: FedPMAvgM(server_momentum=0.9), FedPMAdam, FedPMYogi, FedPMAdagrad])
def test_the_statistics_of_batchnorm_are_mixed_and_not_stepped(make: Callable[[], FedPM]) -> None:
    """A variance with momentum may overshoot 0, and then the model gives NaN."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).double()
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number = messages.server_round_of(message)
        old = message.content.array_records[messages.ARRAYS].to_torch_state_dict()
        new = {key: value - 0.1 if value.is_floating_point() else value + 1 for key, value in old.items()}
        new["1.running_var"] = torch.full((2,), max(1.0 - 0.9 * number, 0.01), dtype=torch.float64)
        return reply_with(message, ArrayRecord(new), {"num-examples": 1})

    strategy = make()
    strategy.fraction_evaluate = 0.0
    state = federate(app, strategy, model, CLIENTS, 3).arrays.to_torch_state_dict()
    torch.testing.assert_close(state["1.running_var"], torch.full((2,), 0.01, dtype=torch.float64))
    assert int(state["1.num_batches_tracked"]) == 3
    assert state["1.num_batches_tracked"].dtype == torch.int64
    assert float(state["1.bias"].max()) < 0


class WithBuffers(nn.Module):
    """Buffers of every sort, one called as no library would."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.register_buffer("ema_var", torch.ones(2, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seen", torch.tensor([True, False]))
        self.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))


def buffers_of(model: nn.Module) -> set[str]:
    """As docs/adopt.md has it."""
    return model.state_dict().keys() - dict(model.named_parameters(remove_duplicate=False)).keys()


@pytest.mark.parametrize(
    "make", [lambda **more: FedPMAvgM(server_momentum=0.9, **more), FedPMAdam, FedPMYogi, FedPMAdagrad]
)
@pytest.mark.parametrize("names_buffers", [False, True])
def test_buffers_of_any_name(make: Callable[..., FedPM], names_buffers: bool, tmp_path: Path) -> None:
    """Whole numbers and infinities are never stepped; floating-point buffers are not if they are named."""
    app, model = ClientApp(), WithBuffers()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number = messages.server_round_of(message)
        new = dict(message.content.array_records[messages.ARRAYS].to_torch_state_dict())
        new["weight"], new["count"] = new["weight"] - 0.1, new["count"] + 12
        new["ema_var"] = torch.full_like(new["ema_var"], max(1.0 - 0.9 * number, 0.01))
        return reply_with(message, ArrayRecord(new), {"num-examples": 1})

    tell_partitions(app)

    def run(rounds: int, folder: str, **more: Any) -> State:
        unstepped = buffers_of(model) if names_buffers else ()
        strategy = Checkpointed(make(unstepped=unstepped, **options()), tmp_path / folder, **more)
        return dict(federate(app, strategy, model, CLIENTS, rounds, wrap=ordered).arrays.to_torch_state_dict())

    state = run(3, "whole")
    assert (int(state["count"]), state["count"].dtype) == (36, torch.int64)
    assert torch.equal(state["seen"], model.state_dict()["seen"])
    assert torch.equal(state["mask"], model.state_dict()["mask"])
    assert float(state["weight"].max()) < 1
    assert bool((state["ema_var"] == 0.01).all()) == names_buffers
    run(2, "broken")
    for key, value in run(3, "broken", resume=tmp_path / "broken").items():
        assert torch.equal(value, state[key])


def test_unstepped_names_that_the_model_does_not_have_are_refused() -> None:
    strategy = FedPMAvgM(**options(server_momentum=0.9, unstepped=["weight", "running"]))
    with pytest.raises(ValueError, match=r"unstepped names \['running'\], which are not among the model's arrays"):
        federate(plain_client(), strategy, make_model(), CLIENTS)


def test_metrics_are_aggregated_once_and_by_the_users_function() -> None:
    seen: list[int] = []

    def mine(contents: list[RecordDict], weighted_by: str) -> MetricRecord:
        seen.append(len(contents))
        return MetricRecord({"most": max(float(str(c.metric_records["metrics"]["loss"])) for c in contents)})

    strategy = FedPMAdam(**options(train_metrics_aggr_fn=mine))
    result = federate(plain_client(), strategy, make_model(), CLIENTS, 2)
    assert seen == [CLIENTS, CLIENTS]
    assert result.train_metrics_clientapp[2] == MetricRecord({"most": 2.0})


def test_the_summary_names_both(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="flwr"):
        FedPMAvgM(server_momentum=0.25, server_learning_rate=0.125).summary()
    assert "Server Momentum: 0.25" in caplog.text
    assert "Server learning rate: 0.125" in caplog.text


@pytest.mark.parametrize("make", [FedAdam, GuardedFedAdam, FedPMAdam])
def test_a_parameter_without_dimensions_is_in_the_checkpoint(
    make: type[FedAvg], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As a learned temperature: numpy makes numbers, not arrays, of the moments of it."""
    model = nn.ParameterDict({"temperature": torch.tensor(1.0)})
    app = plain_client()
    strategy = Checkpointed(make(**options()), tmp_path)
    whole = federate(copy.copy(app), strategy, model, CLIENTS, 3, wrap=ordered).arrays.to_torch_state_dict()
    federate(app, Checkpointed(make(**options()), tmp_path / "b"), model, CLIENTS, 2, wrap=ordered)
    again = Checkpointed(make(**options()), tmp_path / "b", resume=tmp_path / "b")
    found = federate(app, again, model, CLIENTS, 3, wrap=ordered).arrays.to_torch_state_dict()
    assert "no checkpoint" not in caplog.text
    assert torch.equal(found["temperature"], whole["temperature"])
