"""Replies broken in any way: a strategy leaves them out or is right about them; it never raises.

Right means, for FedPM: the gradient of Σ wᵢ ‖ϑ − θᵢ‖²_Pᵢ vanishes at the new model (invariant I6), worked
out here with dense matrices from the replies' own bytes; for averaging strategies: the weighted mean.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdam
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fedpm_flwr import messages
from fedpm_flwr.curvature import Block, Dense, KroneckerRight, LayerCurvature
from fedpm_flwr.guarded import Guarded
from fedpm_flwr.inline import InlineGrid, task_identity
from fedpm_flwr.optim import FOOF
from fedpm_flwr.strategy import FedPM
from fedpm_flwr.training import fit
from fedpm_flwr.wire import decode, encode

from .apps import half_squared_error
from .helpers import CODECS

CLIENTS = 3
Round = tuple[list[Message], list[Message]]
Vector = np.ndarray[Any, np.dtype[np.float64]]


class GuardedFedAdam(Guarded, FedAdam):
    """A stock strategy of another kind, guarded by the mixin."""


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


SHAPES = {key: tuple(value.shape) for key, value in make_model().state_dict().items()}
FLOATS = [key for key, value in make_model().state_dict().items() if value.is_floating_point()]


@pytest.fixture(scope="module")
def exchange() -> Iterator[Round]:
    """One round's requests, and the replies of real clients to them."""
    with task_identity(1):
        grid = InlineGrid(ClientApp(), CLIENTS, {}, seed=0)
        arrays = ArrayRecord(make_model().state_dict())
        requests = list(FedPM(min_available_nodes=CLIENTS).configure_train(1, arrays, ConfigRecord(), grid))
        yield requests, [client(request, i) for i, request in enumerate(requests)]


def client(request: Message, number: int) -> Message:
    generator = torch.Generator().manual_seed(number)
    x, y = torch.randn(8, 3, generator=generator), torch.randn(8, 2, generator=generator)
    model = make_model()
    optimizer = FOOF(model, lr=0.3, damping=0.1, max_factor_side=4)
    fit(model, [(x, y)], optimizer, half_squared_error, epochs=2)
    return messages.train_reply(request, model, {"num-examples": 8 + number, "loss": 1.0}, optimizer)


def with_content(reply: Message, content: RecordDict) -> Message:
    changed = copy.copy(reply)
    changed.content = content
    return changed


# ---- ways of breaking a reply

numbers = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-320, 1e19, -3e38, 1e200, 2.0**53, float("inf"), float("nan")]),
    st.floats(width=32),
)
odd_metrics = st.one_of(numbers, st.integers(-(2**62), 2**62), st.lists(st.floats(), max_size=3))
dtypes = st.sampled_from(["float16", "float32", "float64", "int64", "uint8", "bool", "complex64", "object", "S4"])


def damage(draw: st.DrawFn, data: bytes) -> bytes:
    """Cut, extended, overwritten somewhere, or other bytes altogether."""
    how = draw(st.sampled_from(["cut", "longer", "overwrite", "other"]))
    if how == "cut":
        return data[: draw(st.integers(0, len(data)))]
    if how == "longer":
        return data + draw(st.binary(min_size=1, max_size=9))
    if how == "other":
        return draw(st.binary(max_size=60))
    at = draw(st.integers(0, max(len(data) - 1, 0)))
    patch = draw(st.binary(min_size=1, max_size=8))
    return data[:at] + patch + data[at + len(patch) :]


def break_arrays(draw: st.DrawFn, content: RecordDict) -> RecordDict:
    arrays = dict(next(iter(content.array_records.values())))
    key = draw(st.sampled_from(sorted(arrays)))
    how = draw(
        st.sampled_from(["missing", "extra", "renamed", "value", "dtype", "shape", "bytes", "label", "records"])
    )
    value = arrays[key].numpy().copy()
    if how == "missing":
        del arrays[key]
    elif how == "extra":
        arrays["bonus"] = arrays[key]
    elif how == "renamed":
        arrays[draw(st.text(max_size=4))] = arrays.pop(key)
    elif how == "value":
        value = value.astype(draw(st.sampled_from(["float32", "float64", "int64"])))
        with np.errstate(all="ignore"):
            value.reshape(-1)[: draw(st.integers(1, value.size))] = np.asarray(draw(numbers)).astype(value.dtype)
        arrays[key] = Array(value)
    elif how == "dtype":
        with np.errstate(all="ignore"):
            arrays[key] = Array(value.astype(draw(dtypes.filter(lambda name: name != "object"))))
    elif how == "shape":
        arrays[key] = Array(np.ones(draw(st.lists(st.integers(0, 3), max_size=3)), dtype=value.dtype))
    elif how == "bytes":
        arrays[key] = replace_array(arrays[key], data=damage(draw, arrays[key].data))
    elif how == "label":
        arrays[key] = replace_array(
            arrays[key],
            dtype=draw(dtypes),
            shape=tuple(draw(st.lists(st.integers(-1, 5), max_size=3))),
            stype=draw(st.sampled_from(["numpy.ndarray", "pickle"])),
        )
    else:
        records = {name: ArrayRecord(arrays) for name in draw(st.sampled_from([(), ("other",), ("a", "b")]))}
        return RecordDict({**{k: v for k, v in content.items() if k not in content.array_records}, **records})
    return RecordDict({**content, messages.ARRAYS: ArrayRecord(arrays)})


def replace_array(array: Array, **changes: Any) -> Array:
    fields = {"dtype": array.dtype, "shape": array.shape, "stype": array.stype, "data": array.data}
    return Array(**(fields | changes))


def break_metrics(draw: st.DrawFn, content: RecordDict) -> RecordDict:
    how = draw(st.sampled_from(["weight", "no weight", "more", "records"]))
    metrics: dict[str, Any] = dict(next(iter(content.metric_records.values())))
    if how == "weight":
        metrics["num-examples"] = draw(odd_metrics)
    elif how == "no weight":
        del metrics["num-examples"]
    elif how == "more":
        metrics[draw(st.sampled_from(["loss", "diverged", "x"]))] = draw(odd_metrics)
    else:
        records = {name: MetricRecord(metrics) for name in draw(st.sampled_from([(), ("other",), ("a", "b")]))}
        return RecordDict({**{k: v for k, v in content.items() if k != messages.METRICS}, **records})
    return RecordDict({**content, messages.METRICS: MetricRecord(metrics)})


def break_curvature(draw: st.DrawFn, content: RecordDict) -> RecordDict:
    record: dict[str, Any] = dict(content.config_records[messages.CURVATURE])
    how = draw(st.sampled_from(["none", "bytes", "type", "version", "made up"]))
    if how == "none":
        return RecordDict({k: v for k, v in content.items() if k != messages.CURVATURE})
    if how == "bytes":
        record[messages.PAYLOAD] = damage(draw, record[messages.PAYLOAD])
    elif how == "type":
        record[messages.PAYLOAD] = draw(st.one_of(st.integers(0, 9), st.text(max_size=3), st.just([b"x"])))
    elif how == "version":
        record[messages.VERSION] = draw(st.sampled_from(["0.1.9", "0.2.0", "9", "", 3, ["0.1.0"]]))
    else:
        layers = [made_up_layer(draw) for _ in range(draw(st.integers(1, 3)))]
        codec = draw(st.sampled_from(sorted(set(CODECS) - {"positions", "auto-99"})))  # of layers that exist
        with suppress(ValueError):  # what cannot be said is not sent
            record[messages.PAYLOAD] = encode(layers, codec)
    return RecordDict({**content, messages.CURVATURE: ConfigRecord(record)})


GROUPS = [("0.weight", "0.bias"), ("2.weight",), ("1.weight",), ("nowhere",), ("2.bias", "2.weight")]


def made_up_layer(draw: st.DrawFn) -> LayerCurvature:
    parameters = draw(st.sampled_from(GROUPS))
    side = draw(st.sampled_from([1, 4, 5, 8, 16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    half = torch.randn(side, draw(st.integers(1, side)), generator=generator, dtype=torch.float64)
    matrix = half @ half.T * 10.0 ** draw(st.integers(-310, 150)) + draw(numbers) * torch.eye(
        side, dtype=torch.float64
    )
    kind = draw(st.sampled_from([KroneckerRight, Dense]))
    damping = draw(st.sampled_from([0.0, 1e-12, 1e-3, 1.0, 1e6, 1e7]))
    return LayerCurvature(Block(parameters[0].split(".")[0], parameters), kind(matrix), damping)


BREAKERS: list[Callable[[st.DrawFn, RecordDict], RecordDict]] = [break_arrays, break_metrics, break_curvature]


@st.composite
def broken(draw: st.DrawFn, reply: Message) -> Message:
    if draw(st.integers(0, 19)) == 0:
        failed = copy.copy(reply)
        failed.__dict__["_content"], failed.__dict__["_error"] = None, Error(0, draw(st.text(max_size=9)))
        return failed
    content = reply.content
    for breaker in draw(st.lists(st.sampled_from(BREAKERS), min_size=1, max_size=3, unique=True)):
        if (breaker is break_curvature and messages.CURVATURE in content) or (
            breaker is not break_curvature and content.array_records and content.metric_records
        ):
            try:
                content = breaker(draw, content)
            except (TypeError, ValueError):
                continue  # Flower itself does not let a client say this
    return with_content(reply, content)


# ---- what the result should be


def residual(result: dict[str, torch.Tensor], replies: list[Message]) -> None:
    """Σ wᵢ Pᵢ (ϑ − θᵢ) = 0 in each group of parameters, to float32's precision of the terms."""
    groups: dict[tuple[str, ...], list[tuple[float, Vector, Vector]]] = {}
    updates = [read_independently(reply) for reply in replies]
    for weight, state, layers in updates:
        for names, matrix in layers.items():
            groups.setdefault(names, []).append((weight, matrix, vector(names, state)))
    curved = {name for names in groups for name in names}
    for names, terms in groups.items():
        alone = all(set(names) == set(other) or not set(names) & set(other) for other in groups)
        if len(terms) < len(updates) or not alone:
            continue  # mixed with averaging: test_mixing.py has these cases
        new = vector(names, {key: value.double().numpy() for key, value in result.items()})
        off = sum(weight * matrix @ (new - theta) for weight, matrix, theta in terms)
        size = sum(
            weight * np.abs(matrix) @ (np.abs(new) + np.abs(theta) + np.abs(theta - vector(names, THETA)))
            for weight, matrix, theta in terms
        )
        assert np.all(np.abs(off) <= 1e-6 * np.max(size)), (names, off, size)
    for name in set(SHAPES) - curved:
        total = sum(weight for weight, _, _ in updates)
        mean = sum(weight / total * state[name] for weight, state, _ in updates)
        scale = max(np.abs(state[name]).max() for _, state, _ in updates) + np.abs(THETA[name]).max()
        rounding = 0.5 if name not in FLOATS else 0.0
        np.testing.assert_allclose(result[name].double().numpy(), mean, rtol=1e-6, atol=1e-6 * scale + rounding)


THETA = {key: value.double().numpy() for key, value in make_model().state_dict().items()}


def vector(names: tuple[str, ...], state: Any) -> Vector:
    """A layer's weight and bias as one matrix [out, in + 1], row after row."""
    columns = [np.asarray(state[name], dtype=np.float64).reshape(SHAPES[name][0], -1) for name in names]
    return np.concatenate(columns, axis=1).reshape(-1)


def read_independently(reply: Message) -> tuple[float, dict[str, Vector], dict[tuple[str, ...], Vector]]:
    """Weight, model and dense damped curvature of a reply, by NumPy."""
    ((record,), (metrics,)) = reply.content.array_records.values(), reply.content.metric_records.values()
    state = {
        key: array.numpy().astype(np.float32 if key in FLOATS else np.int64).astype(np.float64)
        for key, array in record.items()
    }
    layers: dict[tuple[str, ...], Vector] = {}
    payload = reply.content.config_records.get(messages.CURVATURE, ConfigRecord()).get(messages.PAYLOAD)
    for layer in decode(payload, SHAPES) if isinstance(payload, bytes) else []:
        names, matrix = layer.block.parameters, layer.curvature.to(torch.float64)
        size = sum(int(np.prod(SHAPES[name])) for name in names)
        layers[names] = matrix.to_dense(size).numpy() + layer.damping * np.eye(size)
    weight = metrics["num-examples"]
    assert isinstance(weight, int | float)
    return float(weight), state, layers


class Listener(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class Exchange:
    """Aggregates by a strategy, and tells which of the replies it left out."""

    def __init__(self, strategy: Guarded, requests: list[Message]) -> None:
        grid = InlineGrid(ClientApp(), CLIENTS, {}, seed=0)
        arrays = ArrayRecord(make_model().state_dict())
        list(strategy.configure_train(1, arrays, ConfigRecord(), grid))
        self.strategy = strategy

    def aggregate(self, replies: list[Message]) -> tuple[dict[str, torch.Tensor] | None, list[str]]:
        handler = Listener()
        logger = logging.getLogger("flwr")
        logger.addHandler(handler)
        try:
            arrays, _ = self.strategy.aggregate_train(1, replies)
        finally:
            logger.removeHandler(handler)
        said = [record.getMessage() for record in handler.records if record.levelno >= logging.WARNING]
        return (None if arrays is None else dict(arrays.to_torch_state_dict())), said


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_fedpm_leaves_a_broken_reply_out_or_is_right(exchange: Round, data: st.DataObject) -> None:
    requests, good = exchange
    bad = data.draw(broken(good[0]))
    replies = data.draw(st.permutations([bad, *good[1:]]))
    result, said = Exchange(FedPM(min_available_nodes=CLIENTS), requests).aggregate(replies)
    assert result is not None
    assert all(torch.isfinite(value).all() for value in result.values())
    left_out = [line for line in said if "left out the reply" in line]
    assert len(left_out) <= 1
    residual(result, [reply for reply in replies if reply is not bad or not left_out])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_averaging_leaves_a_broken_reply_out_or_is_right(exchange: Round, data: st.DataObject) -> None:
    requests, good = exchange
    bad = data.draw(broken(good[0]))
    result, said = Exchange(Guarded(min_available_nodes=CLIENTS), requests).aggregate([bad, *good[1:]])
    assert result is not None
    left_out = [line for line in said if "left out the reply" in line]
    kept = [without_curvature(reply) for reply in ([] if left_out else [bad]) + good[1:]]
    residual(result, kept)
    assert {key: value.dtype for key, value in result.items()} == {
        key: value.dtype for key, value in make_model().state_dict().items()
    }


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_another_stock_strategy_under_the_guard_never_raises(exchange: Round, data: st.DataObject) -> None:
    requests, good = exchange
    bad = data.draw(broken(good[0]))
    strategy = GuardedFedAdam(min_available_nodes=CLIENTS)
    result, said = Exchange(strategy, requests).aggregate([bad, *good[1:]])
    if result is None:
        assert any("the model stays as it was" in line for line in said)
    else:
        assert all(torch.isfinite(value).all() for value in result.values())


def without_curvature(reply: Message) -> Message:
    return with_content(reply, RecordDict({k: v for k, v in reply.content.items() if k != messages.CURVATURE}))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_broken_evaluations_are_left_out(exchange: Round, data: st.DataObject) -> None:
    def evaluation(number: int) -> Message:
        content = RecordDict({"metrics": MetricRecord({"num-examples": 1 + number, "loss": float(number)})})
        return with_content(good[number], content)

    requests, good = exchange
    bad = with_content(good[0], data.draw(st.composite(break_metrics)(evaluation(0).content)))
    strategy = Exchange(Guarded(min_available_nodes=CLIENTS), requests).strategy
    metrics = strategy.aggregate_evaluate(1, [bad, evaluation(1), evaluation(2)])
    assert metrics is not None


def test_the_breakers_break(exchange: Round) -> None:
    """Of the replies that the campaign makes, many are left out and many are kept: it tests both."""
    requests, good = exchange
    counts = {True: 0, False: 0}

    @settings(
        max_examples=200,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(data=st.data())
    def count(data: st.DataObject) -> None:
        _, said = Exchange(FedPM(min_available_nodes=CLIENTS), requests).aggregate(
            [data.draw(broken(good[0])), *good[1:]]
        )
        counts[any("left out" in line for line in said)] += 1

    count()
    assert min(counts.values()) > 20
