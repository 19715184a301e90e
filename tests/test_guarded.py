"""Rounds that go on: what is left out, what is said, when it stops; under stock strategies too."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian
from torch import nn

from fedpm_flwr import messages
from fedpm_flwr.checkpointed import Checkpointed
from fedpm_flwr.grids import WrappedGrid
from fedpm_flwr.guarded import FailedRoundsError, Guarded
from fedpm_flwr.inline import InlineGrid, task_identity
from fedpm_flwr.strategy import FedPM

from .apps import federate, ordered, reply_with, tell_partitions


class GuardedFedAdam(Guarded, FedAdam):
    """A server optimizer under the guard."""


class GuardedFedMedian(Guarded, FedMedian):
    """A robust aggregation under the guard."""


STRATEGIES = [Guarded, FedPM, GuardedFedAdam, GuardedFedMedian]


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def client(bad: dict[int, set[int]], metrics: dict[str, float] | None = None) -> ClientApp:
    """Adds 1 to all parameters; the partitions in ``bad[round]`` send NaN instead."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition, number = messages.partition_of(context)[0], messages.server_round_of(message)
        step = float("nan") if partition in bad.get(number, ()) else 1.0
        old = message.content.array_records[messages.ARRAYS].to_torch_state_dict()
        state = {key: value + step if value.is_floating_point() else value + 2 for key, value in old.items()}
        return reply_with(message, ArrayRecord(state), {"num-examples": 1 + partition, **(metrics or {})})

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        partition, number = messages.partition_of(context)[0], messages.server_round_of(message)
        if partition in bad.get(number, ()):
            return messages.metrics_reply(message, {"num-examples": 0})
        return messages.metrics_reply(message, {"num-examples": 1, "loss": float(partition)})

    tell_partitions(app)
    return app


def stays(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "the model stays as it was" in record.getMessage()]


def test_the_warning_names_node_partition_and_reason(caplog: pytest.LogCaptureFixture) -> None:
    federate(client({1: {2}}), FedPM(), make_model(), 4, wrap=ordered)
    (line,) = [record.getMessage() for record in caplog.records if "left out the reply" in record.getMessage()]
    assert line.startswith("fedpm | round 1: left out the reply of node ")
    assert line.endswith("(partition 2): array '0.weight' is not finite")


def test_without_a_grid_that_knows_partitions_the_node_is_named(caplog: pytest.LogCaptureFixture) -> None:
    federate(client({1: {2}}), FedPM(), make_model(), 4)
    assert "partition" not in caplog.text


@pytest.mark.parametrize("make", STRATEGIES)
def test_stock_strategies_go_on_without_the_bad_replies(
    make: type[Guarded], caplog: pytest.LogCaptureFixture
) -> None:
    result = federate(client({1: {0}, 2: {1}}), make(), make_model(), 3, rounds=3, wrap=ordered)
    state = result.arrays.to_torch_state_dict()
    assert all(torch.isfinite(value).all() for value in state.values())
    assert caplog.text.count("left out the reply") == 2
    assert caplog.text.count("left out the evaluation") == 2
    assert result.evaluate_metrics_clientapp[1] == MetricRecord({"loss": 1.5})


def test_guarded_averaging_is_stock_averaging_where_nothing_is_wrong() -> None:
    states = [
        federate(client({}, {"loss": 2.0}), make(), make_model(), 3, rounds=2).arrays.to_torch_state_dict()
        for make in (FedAvg, Guarded)
    ]
    for key, value in states[0].items():
        if key != "1.num_batches_tracked":  # a float after Flower's average: the next test
            torch.testing.assert_close(states[1][key], value)


def test_counters_stay_whole_numbers_over_rounds() -> None:
    """Flower's averaging makes floats of them, and then no client's integers would fit."""
    state = federate(client({}), Guarded(), make_model(), 3, rounds=3).arrays.to_torch_state_dict()
    assert state["1.num_batches_tracked"].dtype == torch.int64
    assert state["1.num_batches_tracked"] == 6


@pytest.mark.parametrize("make", [Guarded, FedPM])
def test_too_few_replies_keep_the_model_and_then_stop_the_run(
    make: type[Guarded], caplog: pytest.LogCaptureFixture
) -> None:
    bad = {2: {0, 1}, 3: {0, 1}, 4: {0}, 5: {0, 1}, 6: {1, 2}, 7: {0, 1, 2}}
    with pytest.raises(
        FailedRoundsError,
        match="round 7: 0 usable replies, but min-replies is 2; that was failed round 3 in a row",
    ):
        federate(client(bad), make(min_replies=2), make_model(), 3, rounds=9)
    assert [line.split(":")[0] for line in stays(caplog)] == [f"fedpm | round {i}" for i in (2, 3, 5, 6)]


@pytest.mark.parametrize("make", [Guarded, FedPM])
def test_a_round_that_fails_leaves_no_trace(make: type[Guarded]) -> None:
    with_gap = federate(client({2: {0, 1}}), make(min_replies=2), make_model(), 3, rounds=3)
    without = federate(client({}), make(), make_model(), 3, rounds=2)
    for key, value in without.arrays.to_torch_state_dict().items():
        torch.testing.assert_close(with_gap.arrays.to_torch_state_dict()[key], value)
    assert set(with_gap.train_metrics_clientapp) == {1, 3}


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="min_replies must be >= 1, not 0"):
        Guarded(min_replies=0)
    with pytest.raises(ValueError, match="max_failed_rounds must be >= 1, not 0"):
        Guarded(max_failed_rounds=0)
    with pytest.raises(ValueError, match="unknown weighting 'equal'; allowed: num-examples, uniform"):
        Guarded(weighting="equal")


class Overflowing(Guarded, FedAdam):
    """Flower's own step, of a length that float32 cannot hold."""

    def __init__(self, **options: Any) -> None:
        super().__init__(eta=1e300, **options)


class Faulty(FedAvg):
    """A strategy with a fault."""

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        raise KeyError("mine")


class Raising(Guarded, Faulty):
    """It under the guard."""


def fail(contents: list[RecordDict], weighted_by: str) -> MetricRecord:
    raise KeyError("mine")


@pytest.mark.parametrize(
    ("make", "reason"),
    [(Overflowing, "ValueError: the aggregated '0.weight' is not finite"), (Raising, "KeyError: 'mine'")],
)
def test_a_strategy_that_fails_keeps_the_model_and_then_stops_the_run(
    make: type[Guarded], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(FailedRoundsError, match=f"round 3: {reason}; that was failed round 3 in a row"):
        federate(client({}), make(), make_model(), 2, rounds=5)
    assert stays(caplog) == [f"fedpm | round {i}: {reason}: the model stays as it was" for i in (1, 2)]


@pytest.mark.parametrize("make", STRATEGIES)
@pytest.mark.parametrize("phase", ["train", "evaluate"])
def test_a_function_for_metrics_that_fails_costs_the_metrics_alone(
    make: type[Guarded], phase: str, caplog: pytest.LogCaptureFixture
) -> None:
    functions: dict[str, Any] = {f"{phase}_metrics_aggr_fn": fail}
    strategy = make(**functions)
    result = federate(client({}), strategy, make_model(), 2, rounds=2)
    told = {"train": result.train_metrics_clientapp, "evaluate": result.evaluate_metrics_clientapp}
    assert told.pop(phase) == {}
    assert [set(others) for others in told.values()] == [{1, 2}]
    assert caplog.text.count("metrics could not be aggregated: KeyError('mine')") == 2
    assert not stays(caplog)


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_a_short_run_whose_rounds_all_fail_ends_with_an_error(is_checkpointed: bool, tmp_path: Path) -> None:
    """And not with an empty model, as under FedAvg."""
    strategy = Checkpointed(FedPM(), tmp_path) if is_checkpointed else FedPM()
    with pytest.raises(FailedRoundsError, match="no round gave a new model; the log says what was wrong"):
        federate(client({1: {0, 1}, 2: {0, 1}}), strategy, make_model(), 2, rounds=2)


@pytest.mark.parametrize("base", [Guarded, FedPM])
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_a_subclass_may_go_through_the_replies_as_through_a_list(
    base: type[Guarded], is_checkpointed: bool, tmp_path: Path
) -> None:
    """As it may under FedAvg: count them, look into them before, and after."""
    seen = []

    class Own(base):  # type: ignore[valid-type,misc]  # a base that is a parameter
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            assert isinstance(replies, list)
            before = [reply.metadata.src_node_id for reply in replies]
            made = super().aggregate_train(server_round, replies)
            seen.append((len(replies), before == [reply.metadata.src_node_id for reply in replies]))
            return made

    strategy = Checkpointed(Own(), tmp_path) if is_checkpointed else Own()
    own = federate(client({}), strategy, make_model(), 3, rounds=2).arrays.to_torch_state_dict()
    assert seen == [(3, True)] * 2
    for key, value in federate(client({}), base(), make_model(), 3, rounds=2).arrays.to_torch_state_dict().items():
        torch.testing.assert_close(own[key], value)


@pytest.mark.parametrize("base", [Guarded, FedPM])
def test_a_subclass_that_makes_its_requests_alone_is_told_so(base: type[Guarded]) -> None:
    class Own(base):  # type: ignore[valid-type,misc]  # a base that is a parameter
        def configure_train(
            self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
        ) -> Iterable[Message]:
            content = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": server_round})})
            return [Message(content, dst_node_id=node, message_type="train") for node in grid.get_node_ids()]

    with pytest.raises(RuntimeError, match=r"configure_train of Own does not call super\(\)\.configure_train"):
        federate(client({}), Own(), make_model(), 2)


def test_without_training_no_round_fails() -> None:
    result = federate(client({}), Guarded(fraction_train=0.0), make_model(), 2, rounds=5)
    assert set(result.evaluate_metrics_clientapp) == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("make", [Guarded, FedPM])
def test_buffers_at_the_ends_of_their_types_are_no_harm_where_nobody_changes_them(make: type[Guarded]) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf, torch.finfo(torch.float32).min]))
            self.register_buffer("least", torch.tensor([-128, 127], dtype=torch.int8))
            self.register_buffer("large", torch.tensor([2**60]))
            self.register_buffer("flag", torch.tensor(True))
            self.register_buffer("none", torch.zeros(0, 3))

    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        state = dict(message.content.array_records[messages.ARRAYS].to_torch_state_dict())
        return reply_with(message, ArrayRecord({**state, "weight": state["weight"] + 1}), {"num-examples": 1})

    model = Masked()
    strategy = make(fraction_evaluate=0.0, min_evaluate_nodes=0)
    state = federate(app, strategy, model, 3, rounds=2).arrays.to_torch_state_dict()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(state[key], value + 2 if key == "weight" else value)


@pytest.mark.parametrize("value", [-1, 300])
def test_whole_numbers_that_would_wrap_around_are_refused(value: int, caplog: pytest.LogCaptureFixture) -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return reply_with(message, ArrayRecord({"n": torch.tensor([value])}), {"num-examples": 1})

    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("n", torch.tensor([5], dtype=torch.uint8))

    with pytest.raises(FailedRoundsError, match="no round gave a new model"):
        federate(app, Guarded(), Counter(), 2)
    assert caplog.text.count("array 'n' has a value beyond 0 or 255") == 2


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_every_exchange_of_a_round_has_the_timeout_of_the_run(is_checkpointed: bool, tmp_path: Path) -> None:
    """Those beside training too, whether the run is started by the strategy or by what is around it."""
    seen: list[float | None] = []

    class Recording(WrappedGrid):
        def send_and_receive(
            self, messages: Iterable[Message], *, timeout: float | None = None
        ) -> Iterable[Message]:
            seen.append(timeout)
            return []

    strategy = Guarded(min_train_nodes=1, min_available_nodes=1, fraction_evaluate=0.0)
    started = Checkpointed(strategy, tmp_path) if is_checkpointed else strategy
    with task_identity(1):
        grid = InlineGrid(client({}), 2, {})
        started.start(grid, ArrayRecord(make_model().state_dict()), num_rounds=1, timeout=7.0)
    strategy.ask(2, Recording(grid), [], "phase", {})
    assert seen == [7.0]
