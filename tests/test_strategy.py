"""FedPM beside Flower's own parts: what it asks, what it leaves out, what others make of its clients."""

import logging
import re
from collections.abc import Callable

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian, Krum, Strategy
from torch import Tensor, nn

from fedpm_flwr import messages
from fedpm_flwr.curvature import Block, KroneckerRight, LayerCurvature
from fedpm_flwr.strategy import FedPM
from fedpm_flwr.wire import encode

from .apps import federate, regression_client, reply_with


def make_model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(2, 1)


def data(partition: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(partition)
    return torch.randn(5 + partition, 2, generator=generator), torch.ones(5 + partition, 1)


def good_client() -> ClientApp:
    return regression_client(data, make_model, lr=0.5, damping=0.1)


def curvature_of(side: int = 3, damping: float = 0.1, value: float = 1.0) -> ConfigRecord:
    layer = LayerCurvature(Block("", ("weight", "bias")), KroneckerRight(value * torch.eye(side)), damping)
    return ConfigRecord({messages.PAYLOAD: encode([layer], "triangle-float32")})


Breaking = Callable[[Message, ArrayRecord], Message]


def breaking_client(breaking: Breaking) -> ClientApp:
    """Partition 0 answers as ``breaking`` says, the others as they should."""
    app, good = ClientApp(), good_client()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if messages.partition_of(context)[0] == 0:
            return breaking(message, message.content.array_records[messages.ARRAYS])
        return good(message, context)

    return app


def swapped(arrays: ArrayRecord, key: str, value: Tensor) -> ArrayRecord:
    return ArrayRecord({**arrays.to_torch_state_dict(), key: value})


def raising(message: Message, arrays: ArrayRecord) -> Message:
    raise RuntimeError("the disk is on fire")


def two_array_records(message: Message, arrays: ArrayRecord) -> Message:
    return reply_with(message, arrays, {"num-examples": 5}, more=arrays)


BROKEN: dict[str, tuple[Breaking, str]] = {
    "raises": (raising, "the disk is on fire"),
    "no examples": (lambda m, a: reply_with(m, a, {"loss": 1.0}), "'num-examples' is None"),
    "zero examples": (lambda m, a: reply_with(m, a, {"num-examples": 0}), "'num-examples' is 0"),
    "negative examples": (lambda m, a: reply_with(m, a, {"num-examples": -3}), "'num-examples' is -3"),
    "infinite examples": (lambda m, a: reply_with(m, a, {"num-examples": float("inf")}), "'num-examples' is inf"),
    "two records": (two_array_records, "2 ArrayRecords"),
    "no metrics": (lambda m, a: Message(RecordDict({"arrays": a}), reply_to=m), "0 MetricRecords"),
    "missing array": (
        lambda m, a: reply_with(m, ArrayRecord({"weight": Array(a["weight"].numpy())}), {"num-examples": 5}),
        "missing or extra: bias",
    ),
    "extra array": (
        lambda m, a: reply_with(m, swapped(a, "bonus", torch.ones(1)), {"num-examples": 5}),
        "missing or extra: bonus",
    ),
    "broadcasts": (
        lambda m, a: reply_with(m, swapped(a, "weight", torch.ones(1, 1)), {"num-examples": 5}),
        r"array 'weight' is torch.float32 \[1, 1\]",
    ),
    "nan": (
        lambda m, a: reply_with(m, swapped(a, "bias", torch.tensor([torch.nan])), {"num-examples": 5}),
        "array 'bias' is not finite",
    ),
    "whole numbers": (
        lambda m, a: reply_with(m, swapped(a, "bias", torch.tensor([1])), {"num-examples": 5}),
        "array 'bias' is torch.int64",
    ),
    "unreadable array": (
        lambda m, a: reply_with(
            m,
            ArrayRecord({"weight": Array("float32", (1, 2), "numpy.ndarray", b"?"), "bias": a["bias"]}),
            {"num-examples": 5},
        ),
        "array 'weight' cannot be read",
    ),
    "curvature is no bytes": (
        lambda m, a: reply_with(m, a, {"num-examples": 5}, curvature=ConfigRecord({"payload": 3})),
        "curvature is int, not bytes",
    ),
    "curvature is rubbish": (
        lambda m, a: reply_with(m, a, {"num-examples": 5}, curvature=ConfigRecord({"payload": b"rubbish"})),
        "its curvature: ",
    ),
    "curvature of another size": (
        lambda m, a: reply_with(m, a, {"num-examples": 5}, curvature=curvature_of(side=2)),
        "side 2, but its parameters need 3",
    ),
    "damping out of bounds": (
        lambda m, a: reply_with(m, a, {"num-examples": 5}, curvature=curvature_of(damping=1e7)),
        r"damping 10000000.0 is not in \[0.0, 1000000.0\]",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_bad_reply_is_left_out_and_the_reason_said(name: str, caplog: pytest.LogCaptureFixture) -> None:
    breaking, reason = BROKEN[name]
    with caplog.at_level(logging.WARNING, logger="flwr"):
        result = federate(breaking_client(breaking), FedPM(), make_model(), 3)
    warnings = [record.getMessage() for record in caplog.records if "left out the reply" in record.getMessage()]
    assert len(warnings) == 1
    assert re.search(reason, warnings[0]), warnings[0]
    # The others' round is what it would have been without the bad one.
    without = federate(
        regression_client(lambda i: data(i + 1), make_model, lr=0.5, damping=0.1), FedPM(), make_model(), 2
    )
    for key, value in result.arrays.to_torch_state_dict().items():
        torch.testing.assert_close(value, without.arrays.to_torch_state_dict()[key])


def test_a_round_without_a_usable_reply_keeps_the_model() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        raise RuntimeError("no")

    strategy = FedPM()
    result = federate(app, strategy, make_model(), 2, rounds=2)
    assert len(result.arrays) == 0  # Flower's Result: nothing was aggregated
    assert result.train_metrics_clientapp == {}


@pytest.mark.parametrize("make", [FedAvg, FedAdam, FedMedian, Krum])
def test_fedpm_clients_under_stock_strategies_send_no_curvature(make: Callable[[], Strategy]) -> None:
    seen: list[RecordDict] = []
    app, good = ClientApp(), good_client()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        reply = good(message, context)
        seen.append(reply.content)
        return reply

    result = federate(app, make(), make_model(), 3, rounds=2)
    assert len(seen) == 6
    assert all(messages.CURVATURE not in content for content in seen)
    assert set(result.arrays) == {"weight", "bias"}


def test_a_stock_client_under_fedpm_is_averaged() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        arrays = message.content.array_records[messages.ARRAYS]
        value = float(messages.partition_of(context)[0])
        moved = ArrayRecord(
            {key: torch.full_like(old, value) for key, old in arrays.to_torch_state_dict().items()}
        )
        return reply_with(message, moved, {"num-examples": 1 + value})

    state = federate(app, FedPM(), make_model(), 3).arrays.to_torch_state_dict()
    torch.testing.assert_close(state["weight"], torch.full((1, 2), (0 * 1 + 1 * 2 + 2 * 3) / 6))


def test_the_request_is_not_changed_under_the_caller() -> None:
    config = ConfigRecord({"mine": 1})
    strategy = FedPM()
    app, good = ClientApp(), good_client()
    asked: list[str | None] = []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        asked.append(messages.asked_codec(message))
        assert message.content.config_records[messages.CONFIG]["mine"] == 1
        return good(message, context)

    federate(app, strategy, make_model(), 2, train_config=config)
    assert asked == ["triangle-float32"] * 2
    assert dict(config) == {"mine": 1}


def test_metrics_are_averaged_as_flower_does_and_weights_can_be_uniform() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        arrays = message.content.array_records[messages.ARRAYS]
        value = float(messages.partition_of(context)[0])
        moved = ArrayRecord(
            {key: torch.full_like(old, value) for key, old in arrays.to_torch_state_dict().items()}
        )
        return reply_with(message, moved, {"num-examples": 1 + 3 * value, "loss": value})

    result = federate(app, FedPM(weighting="uniform"), make_model(), 2)
    assert result.train_metrics_clientapp[1] == MetricRecord({"loss": 0.8})
    torch.testing.assert_close(result.arrays.to_torch_state_dict()["bias"], torch.tensor([0.5]))


def test_a_sum_that_cannot_be_solved_keeps_the_model(caplog: pytest.LogCaptureFixture) -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        arrays = message.content.array_records[messages.ARRAYS]
        return reply_with(message, arrays, {"num-examples": 1}, curvature=curvature_of(value=0.0, damping=0.0))

    result = federate(app, FedPM(), make_model(), 2)
    assert len(result.arrays) == 0
    assert "the model stays as it was: layer '': a matrix of side 3 is not positive definite" in caplog.text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"server_learning_rate": 0.0}, "server_learning_rate must be"),
        ({"weighting": "fair"}, "unknown weighting 'fair'; allowed: num-examples, uniform"),
        ({"codec": "zip"}, "unknown codec 'zip'"),
    ],
)
def test_wrong_arguments_are_named(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FedPM(**wrong)  # type: ignore[arg-type]


def test_summary_names_the_settings(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="flwr"):
        FedPM(server_learning_rate=0.25, codec="triangle-float64", weighting="uniform").summary()
    for text in ("0.25", "triangle-float64", "uniform"):
        assert text in caplog.text


def test_damping_bounds_are_inclusive() -> None:
    def reply(message: Message, arrays: ArrayRecord) -> Message:
        return reply_with(message, arrays, {"num-examples": 5}, curvature=curvature_of(damping=0.1))

    bounded = federate(breaking_client(reply), FedPM(damping_bounds=(0.1, 0.1)), make_model(), 2)
    assert set(bounded.arrays) == {"weight", "bias"}
