"""FedPM beside Flower's own parts: what it asks, what it leaves out, what others make of its clients."""

import logging
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    Bulyan,
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    MultiKrum,
    QFedAvg,
    Strategy,
)
from torch import Tensor, nn

from fedpm_flwr import messages
from fedpm_flwr.curvature import Block, KroneckerRight, LayerCurvature, Spill
from fedpm_flwr.guarded import FailedRoundsError, Guarded
from fedpm_flwr.optim import KFAC
from fedpm_flwr.rewriting import without_arrays
from fedpm_flwr.strategy import FedPM
from fedpm_flwr.wire import encode

from .apps import federate, full_batch_client, half_squared_error, regression_client, reply_with


def make_model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(2, 1)


def data(partition: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(partition)
    return torch.randn(5 + partition, 2, generator=generator), torch.ones(5 + partition, 1)


def good_client(damping: float = 0.1) -> ClientApp:
    return regression_client(data, make_model, lr=0.5, damping=damping)


def curvature_of(
    side: int = 3,
    damping: float = 0.1,
    value: float = 1.0,
    off_diagonal: float = 0.0,
    parameters: tuple[str, ...] = ("weight", "bias"),
    name: str = "",
) -> ConfigRecord:
    factor = value * torch.eye(side) + off_diagonal * (torch.ones(side, side) - torch.eye(side))
    layer = LayerCurvature(Block(name, parameters), KroneckerRight(factor), damping)
    return ConfigRecord({messages.PAYLOAD: encode([layer], "triangle-float32")})


def cut_off(record: ConfigRecord) -> ConfigRecord:
    payload = record["payload"]
    assert isinstance(payload, bytes)
    return ConfigRecord({"payload": payload[:-4]})


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


def filled(arrays: ArrayRecord, value: float) -> ArrayRecord:
    return ArrayRecord({key: torch.full_like(old, value) for key, old in arrays.to_torch_state_dict().items()})


def raising(message: Message, arrays: ArrayRecord) -> Message:
    raise RuntimeError("the disk is on fire")


def two_array_records(message: Message, arrays: ArrayRecord) -> Message:
    return reply_with(message, arrays, {"num-examples": 5}, more=arrays)


BROKEN: dict[str, tuple[Breaking, str]] = {
    "raises": (raising, "the disk is on fire"),
    "no examples": (lambda m, a: reply_with(m, a, {"loss": 1.0}), "'num-examples' is None"),
    "zero examples": (lambda m, a: reply_with(m, a, {"num-examples": 0}), "'num-examples' is 0"),
    "negative examples": (lambda m, a: reply_with(m, a, {"num-examples": -3}), "'num-examples' is -3"),
    "too many examples": (
        lambda m, a: reply_with(m, a, {"num-examples": 1e308}),
        r"not a number > 0 \(1e-12 to 2\*\*53\)",
    ),
    "infinite examples": (lambda m, a: reply_with(m, a, {"num-examples": float("inf")}), "'num-examples' is inf"),
    "two records": (two_array_records, "2 ArrayRecords"),
    "no metrics": (lambda m, a: Message(RecordDict({"arrays": a}), reply_to=m), "0 MetricRecords"),
    "two metrics records": (
        lambda m, a: reply_with(m, a, {"num-examples": 5}, more=MetricRecord({"num-examples": 5})),
        "2 MetricRecords",
    ),
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
    "too large for float32": (
        lambda m, a: reply_with(
            m, swapped(a, "bias", torch.tensor([1e300], dtype=torch.float64)), {"num-examples": 5}
        ),
        "array 'bias' has a value beyond",
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
        "shapes .* do not fit its parameters, a matrix of 1 x 3",
    ),
    "curvature is indefinite": (
        lambda m, a: reply_with(m, a, {"num-examples": 5}, curvature=curvature_of(value=-0.2)),
        "its curvature: layer '': a matrix of side 3 is not positive definite|negative number on its diagonal",
    ),
    "curvature has a lie off its diagonal": (
        lambda m, a: reply_with(m, a, {"num-examples": 5}, curvature=curvature_of(off_diagonal=1e6)),
        "its curvature: layer '': a matrix of side 3 is not positive definite",
    ),
    "curvature is cut off": (
        lambda m, a: reply_with(
            m,
            a,
            {"num-examples": 5},
            curvature=cut_off(curvature_of()),
        ),
        "its curvature: not a safetensors document",
    ),
    "curvature of another version": (
        lambda m, a: reply_with(
            m, a, {"num-examples": 5}, curvature=ConfigRecord({**curvature_of(), messages.VERSION: "7.0.0"})
        ),
        "its curvature is made by fedpm-flwr '7.0.0'; the server has .*: install the same version on both",
    ),
    "curvature of a layer that is not there": (
        lambda m, a: reply_with(m, a, {"num-examples": 5}, curvature=curvature_of(parameters=("other",))),
        "'other'",
    ),
    "curvature without size": (
        lambda m, a: reply_with(m, a, {"num-examples": 5}, curvature=curvature_of(value=0.0, damping=0.0)),
        "its curvature: layer '': a matrix of trace 0",
    ),
    "curvature of the next minor version": (
        lambda m, a: reply_with(
            m, a, {"num-examples": 5}, curvature=ConfigRecord({**curvature_of(), messages.VERSION: "0.999.0"})
        ),
        "its curvature is made by fedpm-flwr '0.999.0'",
    ),
    "curvature with a long name": (
        lambda m, a: reply_with(m, a, {"num-examples": 5}, curvature=curvature_of(damping=1e7, name="x" * 9999)),
        "layer 'x{49}: damping",
    ),
    "complex": (
        lambda m, a: reply_with(m, swapped(a, "bias", torch.tensor([1 + 1j])), {"num-examples": 5}),
        "array 'bias' is torch.complex64",
    ),
    "hardly any examples": (
        lambda m, a: reply_with(m, a, {"num-examples": 1e-250}),
        "'num-examples' is 1e-250, not a number > 0",
    ),
    "a long list of examples": (
        lambda m, a: reply_with(m, a, {"num-examples": [1.0] * 99999}),
        r"'num-examples' is \[1.0, 1.0.{40,50}, not a number",
    ),
    "forged lines": (
        lambda m, a: reply_with(
            m, swapped(a, "x\nfedpm | round 1: left out the reply of node 7", torch.ones(1)), {"num-examples": 5}
        ),
        "missing or extra: x fedpm",
    ),
    "diverged": (
        lambda m, a: reply_with(m, a, {"num-examples": 5, "diverged": 1}),
        "its training diverged, it says",
    ),
    "huge": (
        lambda m, a: reply_with(m, swapped(a, "bias", torch.tensor([3e38])), {"num-examples": 5}),
        r"array 'bias' has a value beyond -1.84e\+19 or 1.84e\+19",
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
    app, good = ClientApp(), good_client()
    sent: dict[int, dict[str, Tensor]] = {}

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number = messages.server_round_of(message)
        sent[number] = dict(message.content.array_records[messages.ARRAYS].to_torch_state_dict())
        if number == 2:
            raise RuntimeError("no")
        return good(message, context)

    result = federate(app, FedPM(), make_model(), 2, rounds=3)
    assert not torch.equal(sent[1]["weight"], sent[2]["weight"])
    assert torch.equal(sent[2]["weight"], sent[3]["weight"])
    assert set(result.train_metrics_clientapp) == {1, 3}


def test_each_round_mixes_against_the_model_that_it_sent() -> None:
    """With one client and η_s ≠ 1, θ⁺ = θ + η_s (θ₁ − θ), round after round."""
    strategy = FedPM(server_learning_rate=0.5, min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1)
    app, good = ClientApp(), good_client()
    starts, ends = list[Tensor](), list[Tensor]()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        reply = good(message, context)
        starts.append(message.content.array_records[messages.ARRAYS].to_torch_state_dict()["weight"])
        ends.append(reply.content.array_records[messages.ARRAYS].to_torch_state_dict()["weight"])
        return reply

    federate(app, strategy, make_model(), 1, rounds=3)
    for before, after, following in zip(starts, ends, starts[1:], strict=False):
        torch.testing.assert_close(following, before + 0.5 * (after - before))


def test_further_config_records_are_no_matter() -> None:
    app, good = ClientApp(), good_client()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        reply = good(message, context)
        reply.content["mine"] = ConfigRecord({"payload": b"1", "note": "hello"})
        reply.content["another"] = ConfigRecord()
        return reply

    found, expected = (federate(client, FedPM(), make_model(), 3).arrays for client in (app, good))
    for key, value in expected.to_torch_state_dict().items():
        torch.testing.assert_close(found.to_torch_state_dict()[key], value)


def test_metrics_that_only_some_clients_have_are_left_out() -> None:
    client = filling_client(
        lambda i: {"num-examples": 1, "loss": float(i), **({"extra": 4.0} if i else {}), "odd": [1.0] * (i + 1)}
    )
    result = federate(client, FedPM(), make_model(), 2)
    assert result.train_metrics_clientapp[1] == MetricRecord({"loss": 0.5})


def test_a_metrics_function_that_fails_does_not_lose_the_round(caplog: pytest.LogCaptureFixture) -> None:
    def fail(contents: list[RecordDict], weighted_by: str) -> MetricRecord:
        raise KeyError("mine")

    result = federate(good_client(), FedPM(train_metrics_aggr_fn=fail), make_model(), 2)
    assert set(result.arrays) == {"weight", "bias"}
    assert "metrics could not be aggregated: KeyError('mine')" in caplog.text


def test_a_metrics_function_sees_what_the_clients_have_sent_beside_arrays_and_curvature() -> None:
    good = good_client()
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        reply = good(message, context)
        metrics = reply.content.metric_records[messages.METRICS]
        del reply.content[messages.METRICS]
        reply.content["my-metrics"] = metrics
        reply.content["mine"] = ConfigRecord({"note": "hello"})
        return reply

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        content = RecordDict({"my-metrics": MetricRecord({"num-examples": 1})})
        content["mine"] = ConfigRecord({"note": "hello"})
        return Message(content, reply_to=message)

    def aggregate(contents: list[RecordDict], weighted_by: str) -> MetricRecord:
        assert all(set(content) - {"arrays"} == {"my-metrics", "mine"} for content in contents)
        assert weighted_by == "num-examples"
        return MetricRecord({"heard": sum(content["mine"]["note"] == "hello" for content in contents)})

    for make in (FedAvg, Guarded, FedPM):
        functions: dict[str, Any] = {"train_metrics_aggr_fn": aggregate, "evaluate_metrics_aggr_fn": aggregate}
        result = federate(app, make(**functions), make_model(), 3)
        heard = (result.train_metrics_clientapp, result.evaluate_metrics_clientapp)
        assert heard == ({1: MetricRecord({"heard": 3})},) * 2, make


@pytest.mark.parametrize(("size", "is_kept"), [(1 << 19, True), (1 << 21, False)])
def test_large_records_of_ones_own_are_not_held(size: int, is_kept: bool) -> None:
    """As a hostile client's: the server's memory would grow with the clients."""
    content = RecordDict(
        {"metrics": MetricRecord({"num-examples": 1}), "mine": ConfigRecord({"junk": bytes(size)})}
    )
    assert set(without_arrays(content)) == ({"metrics", "mine"} if is_kept else {"metrics"})


def test_how_many_replies_have_curvature_is_said(caplog: pytest.LogCaptureFixture) -> None:
    good = good_client()
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        reply = good(message, context)
        if messages.partition_of(context)[0] == 1:
            del reply.content[messages.CURVATURE]
        return reply

    with caplog.at_level("INFO", "flwr"):
        federate(app, FedPM(), make_model(), 3)
    assert "aggregate_train: Mixed 3 results, 2 of them with curvature" in caplog.text


@pytest.mark.parametrize(
    ("damping", "said"), [((0.1, 0.9), ""), ((0.1, 2.0), "'weight' is damped by 0.1 to 2; the larger counts more")]
)
def test_clients_that_are_damped_differently_are_told_of_once(
    damping: tuple[float, float], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = ClientApp()
    clients = [good_client(damping=one) for one in damping]

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return clients[messages.partition_of(context)[0]](message, context)

    federate(app, FedPM(), make_model(), 2, rounds=3)
    assert caplog.text.count("clients differ in the units of their curvature") == bool(said)
    assert said in caplog.text


def test_other_record_and_weight_names(caplog: pytest.LogCaptureFixture) -> None:
    client = filling_client(lambda i: {"mass": 1 + 2 * i, "loss": float(i)})
    result = federate(client, FedPM(configrecord_key="settings", weighted_by_key="mass"), make_model(), 2)
    assert result.train_metrics_clientapp[1] == MetricRecord({"loss": 0.75})
    assert "no reply held curvature; models are averaged" in caplog.text
    caplog.clear()
    federate(good_client(), FedPM(configrecord_key="settings"), make_model(), 2)
    assert "no reply held curvature" not in caplog.text


def test_a_matrix_over_the_limit_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(FailedRoundsError, match="no round gave a new model"):
        federate(good_client(), FedPM(max_factor_side=2), make_model(), 2)
    assert caplog.text.count("side 3, more than the 2 allowed") == 2


def test_a_payload_over_the_limit_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(FailedRoundsError, match="no round gave a new model"):
        federate(good_client(), FedPM(max_payload_bytes=10), make_model(), 2)
    assert caplog.text.count("more than the 10 allowed") == 2


STOCK: list[Callable[[], Strategy]] = [
    FedAvg,
    FedAvgM,
    FedAdam,
    FedAdagrad,
    FedYogi,
    FedProx,
    FedMedian,
    FedTrimmedAvg,
    Krum,
    MultiKrum,
    Bulyan,
    partial(QFedAvg, client_learning_rate=0.5, train_loss_key="loss"),
]


@pytest.mark.parametrize("make", STOCK)
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


def filling_client(metrics: Callable[[int], dict[str, Any]]) -> ClientApp:
    """Returns a model full of the number of its partition, with these metrics and no curvature."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number = messages.partition_of(context)[0]
        arrays = filled(message.content.array_records[messages.ARRAYS], float(number))
        return reply_with(message, arrays, metrics(number))

    return app


def test_a_stock_client_under_fedpm_is_averaged() -> None:
    client = filling_client(lambda i: {"num-examples": 1 + i})
    state = federate(client, FedPM(), make_model(), 3).arrays.to_torch_state_dict()
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
    client = filling_client(lambda i: {"num-examples": 1 + 3 * i, "loss": float(i)})
    result = federate(client, FedPM(weighting="uniform"), make_model(), 2)
    assert result.train_metrics_clientapp[1] == MetricRecord({"loss": 0.8})
    torch.testing.assert_close(result.arrays.to_torch_state_dict()["bias"], torch.tensor([0.5]))


def test_a_mixture_that_is_not_finite_keeps_the_model(caplog: pytest.LogCaptureFixture) -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        arrays = message.content.array_records[messages.ARRAYS]
        return reply_with(message, swapped(arrays, "bias", torch.tensor([1e19])), {"num-examples": 1})

    with pytest.raises(FailedRoundsError, match="no round gave a new model"):
        federate(app, FedPM(server_learning_rate=1e20), make_model(), 2)
    assert "CurvatureError: the mixed 'bias' is not finite: the model stays as it was" in caplog.text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"server_learning_rate": 0.0}, "server_learning_rate must be"),
        ({"weighting": "fair"}, "unknown weighting 'fair'; allowed: num-examples, uniform"),
        ({"codec": "zip"}, "unknown codec 'zip'"),
        ({"device": "cuda:99"}, "device='cuda:99' is not usable here"),
        ({"damping_bounds": (1.0, 0.1)}, "damping_bounds must be"),
    ],
)
def test_wrong_arguments_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FedPM(**wrong)


@pytest.mark.parametrize(("memory", "kronecker_sum", "spilled"), [(0, "exact", True), (0, "factored", False)])
def test_kronecker_factors_beyond_the_memory_go_to_disk(
    memory: int, kronecker_sum: str, spilled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Spill] = []
    monkeypatch.setattr(Spill, "__init__", noting(Spill.__init__, kept))
    client = full_batch_client(data, make_model, half_squared_error, partial(KFAC, loss="mse", damping=0.1))
    strategy = FedPM(max_factor_memory=memory, kronecker_sum=kronecker_sum)
    result = federate(client, strategy, make_model(), 3)
    assert len(result.train_metrics_clientapp) == 1
    assert any(spill.spilled for spill in kept) == spilled


def noting(original: Callable[..., None], kept: list[Spill]) -> Callable[..., None]:
    def init(self: Spill, *arguments: Any) -> None:
        original(self, *arguments)
        kept.append(self)

    return init


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


class _OwnWrapper(DifferentialPrivacyServerSideFixedClipping):
    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self.strategy.configure_train(server_round, arrays, config, grid)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda strategy: DifferentialPrivacyServerSideFixedClipping(strategy, 0.1, 1.0, 4),
        lambda strategy: DifferentialPrivacyClientSideFixedClipping(strategy, 0.1, 1.0, 4),
        lambda strategy: DifferentialPrivacyServerSideAdaptiveClipping(strategy, 0.1, 4),
        lambda strategy: DifferentialPrivacyClientSideAdaptiveClipping(strategy, 0.1, 4),
        lambda strategy: _OwnWrapper(strategy, 0.1, 1.0, 4),
    ],
)
def test_differential_privacy_that_would_not_cover_curvature_is_refused(
    wrapped: Callable[[Strategy], Strategy],
) -> None:
    with pytest.raises(ValueError, match="protects parameters, not curvature: take a strategy without"):
        federate(good_client(), wrapped(FedPM(fraction_evaluate=0.0)), make_model(), 4)
