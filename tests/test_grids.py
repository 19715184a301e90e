"""Replies one at a time: in order, few held, stragglers and unreachable nodes named, whatever the strategy."""

import gc
import logging
import re
import time
import weakref
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg

from fedpm_flwr import messages
from fedpm_flwr.grids import StreamingGrid, UplinkMeter, WrappedGrid
from fedpm_flwr.guarded import Guarded
from fedpm_flwr.inline import InlineGrid, task_identity
from fedpm_flwr.reproducible import PartitionOrderedGrid
from fedpm_flwr.strategy import FedPM

from .apps import federate, tell_partitions

SIDE = 200


@pytest.fixture(autouse=True)
def _identity() -> Iterator[None]:
    with task_identity(1):
        yield


def reply_app(side: int = SIDE) -> ClientApp:
    """Replies with a matrix of the node's partition."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition = messages.partition_of(context)[0]
        arrays = ArrayRecord({"w": torch.full((side, side), float(partition))})
        return Message(
            RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1, "partition": partition})}),
            reply_to=message,
        )

    tell_partitions(app)
    return app


class Slow(WrappedGrid):
    """Real replies, some of which come late, never, or as the SuperLink's word that their node is gone."""

    def __init__(
        self, grid: Grid, delays: dict[int, float], gone: int | None = None, lost: int | None = None
    ) -> None:
        super().__init__(grid)
        self._delays, self._gone, self._lost = delays, gone, lost
        self._ready: dict[str, float] = {}
        self._node: dict[str, int] = {}
        self.arrays: list[weakref.ref[ArrayRecord]] = []
        self.most_alive = 0
        self.pulls = 0

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        given, now = list(messages), time.monotonic()
        ids: list[str | None] = list(self.inner.push_messages(given))
        for place, (key, message) in enumerate(zip(ids, given, strict=True)):
            assert key is not None
            self._ready[key] = now + self._delays.get(place, 0.0)
            self._node[key] = message.metadata.dst_node_id
            if place == self._lost:
                ids[place] = None
        return cast("list[str]", ids)  # as Flower's own say, and do not mean

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return self.pull_messages(self.push_messages(messages))

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self.pulls += 1
        ready = [key for key in message_ids if self._ready[key] <= time.monotonic()]
        replies = []
        for reply in self.inner.pull_messages(ready):
            if self._node[reply.metadata.reply_to_message_id] == self._gone:
                failed = Message(Error(8, "node unavailable"), reply_to=reply)
                failed.metadata.__dict__["_src_node_id"] = 1
                failed.metadata.__dict__["_reply_to_message_id"] = reply.metadata.reply_to_message_id
                reply = failed
            replies.append(reply)
        gc.collect()
        records = [record for reply in replies if reply.has_content() for record in _arrays_of(reply)]
        self.arrays += [weakref.ref(record) for record in records]
        self.most_alive = max(self.most_alive, sum(ref() is not None for ref in self.arrays))
        return replies


def _arrays_of(reply: Message) -> list[ArrayRecord]:
    return list(reply.content.array_records.values())


def requests(grid: Grid) -> list[Message]:
    content = RecordDict({"config": ConfigRecord({"server-round": 1})})
    return [Message(content, dst_node_id=node, message_type="train") for node in sorted(grid.get_node_ids())]


def partitions(replies: Iterable[Message]) -> Iterator[int]:
    for reply in replies:
        partition = reply.content.metric_records["metrics"]["partition"]
        assert isinstance(partition, int)
        yield partition
        del reply


def by_nodes(grid: Grid) -> list[int]:
    """Partitions in the order of ``requests``."""
    return list(partitions(grid.send_and_receive(requests(grid))))


def test_who_is_waited_for_is_told_while_the_wait_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fedpm_flwr.grids._FIRST_NOTICE_S", 0.1)
    inline = InlineGrid(reply_app(4), 3, {}, seed=3)
    slow = PartitionOrderedGrid(Slow(inline, {1: 2.0}), seed=0)
    nodes = slow.get_node_ids()
    assert sorted(by_nodes(StreamingGrid(slow))) == [0, 1, 2]
    lines = [one.getMessage() for one in caplog.records]
    told = [line for line in lines if "still waiting" in line and "round 1" in line]
    late = sorted(nodes)[1]
    assert 1 <= len(told) <= 5  # after 0.1, 0.2, 0.4, 0.8, 1.6 s
    assert all(f"round 1: no reply of node {late} (partition {nodes.index(late)}) for" in one for one in told)


def test_replies_come_in_the_order_of_their_requests() -> None:
    inline = InlineGrid(reply_app(4), 8, {}, seed=3)
    expected = [list(inline._contexts).index(node) for node in sorted(inline.get_node_ids())]
    slow = Slow(inline, {0: 0.3, 3: 0.6})
    assert by_nodes(StreamingGrid(slow)) == expected
    assert by_nodes(StreamingGrid(slow)) == expected


def test_as_many_are_held_as_fit_and_the_rest_wait() -> None:
    """Of replies of 12 MB two fit into what is read ahead; the one that is looked at is the third."""
    slow = Slow(InlineGrid(reply_app(1800), 12, {}, seed=1), {0: 0.2})
    assert len(list(partitions(StreamingGrid(slow).send_and_receive(requests(slow))))) == 12
    assert slow.most_alive <= 3
    small = Slow(InlineGrid(reply_app(4), 12, {}, seed=1), {})
    assert len(list(partitions(StreamingGrid(small).send_and_receive(requests(small))))) == 12
    assert small.pulls <= 3


@pytest.mark.parametrize(
    ("app", "few"), [(reply_app(4), 2), (reply_app(3000), 4), (ClientApp(), 4)], ids=["small", "large", "errors"]
)
def test_who_has_replied_is_not_waited_for(app: ClientApp, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though of large replies, and where there are errors alone, one is pulled at a time."""
    slept: list[float] = []
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=slept.append)
    monkeypatch.setattr("fedpm_flwr.grids.time", clock)
    slow = Slow(InlineGrid(app, 4, {}, seed=1), {})
    assert sum(1 for _ in StreamingGrid(slow).send_and_receive(requests(slow))) == 4
    assert slept == []
    assert slow.pulls == few


def test_those_who_do_not_reply_in_time_are_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    inline = InlineGrid(reply_app(4), 6, {}, seed=3)
    nodes = sorted(inline.get_node_ids())
    slow = Slow(inline, {0: 60.0, 4: 60.0})
    start = time.monotonic()
    with caplog.at_level(logging.WARNING, "flwr"):
        found = list(StreamingGrid(slow).send_and_receive(requests(slow), timeout=0.5))
    assert [reply.metadata.src_node_id for reply in found] == [nodes[place] for place in (1, 2, 3, 5)]
    assert time.monotonic() - start < 30
    assert f"left out the nodes that did not reply within 0.5 s: {nodes[0]}, {nodes[4]}" in caplog.text


def test_replies_larger_than_what_is_read_ahead() -> None:
    slow = Slow(InlineGrid(reply_app(3000), 3, {}, seed=1), {0: 0.3})
    assert len(list(partitions(StreamingGrid(slow).send_and_receive(requests(slow), timeout=30)))) == 3
    assert slow.most_alive <= 2


def test_a_first_node_that_is_silent_does_not_hide_when_the_others_replied(
    caplog: pytest.LogCaptureFixture,
) -> None:
    slow = Slow(InlineGrid(reply_app(4), 3, {}, seed=3), {0: 6.0})
    with caplog.at_level(logging.DEBUG, "flwr"):
        assert len(list(StreamingGrid(slow).send_and_receive(requests(slow)))) == 3
    after = [float(found) for found in re.findall(r"bytes, ([\d.]+) s after the request", caplog.text)]
    assert max(after[:2]) < 5 <= after[2]


def test_an_error_that_comes_first_does_not_open_the_window() -> None:
    inline = InlineGrid(reply_app(1800), 9, {}, seed=3)
    slow = Slow(inline, {}, gone=sorted(inline.get_node_ids())[0])
    for reply in StreamingGrid(slow).send_and_receive(requests(slow)):
        del reply
    assert len(slow.arrays) == 8
    assert slow.most_alive <= 2


def test_many_silent_nodes_take_few_pulls() -> None:
    slow = Slow(InlineGrid(reply_app(4), 60, {}, seed=3), dict.fromkeys(range(1, 60), 60.0))
    assert len(list(StreamingGrid(slow).send_and_receive(requests(slow), timeout=0.3))) == 1
    assert slow.pulls < 15


def test_a_grid_that_says_nothing_of_what_it_could_not_push() -> None:
    class Fewer(WrappedGrid):
        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            return list(self.inner.push_messages(messages))[1:]

    inline = InlineGrid(reply_app(4), 5, {}, seed=3)
    assert len(list(StreamingGrid(Fewer(inline)).send_and_receive(requests(inline)))) == 4


def test_replies_can_be_gone_through_twice_but_for_those_that_stream() -> None:
    inline = InlineGrid(reply_app(4), 3, {}, seed=3)
    replies = UplinkMeter(inline).send_and_receive(requests(inline))
    assert len(list(replies)) == len(list(replies)) == 3
    pulled = WrappedGrid(inline).pull_messages(inline.push_messages(requests(inline)))
    assert len(list(pulled)) == len(list(pulled)) == 3


def test_what_flower_cannot_count_costs_no_run() -> None:
    """It looks at the first element of a list."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        arrays = ArrayRecord({"weight": torch.ones(2, 3), "bias": torch.zeros(2)})
        metrics = MetricRecord({"num-examples": 1, "none": []})
        content = RecordDict({"arrays": arrays, "metrics": metrics, "more": ConfigRecord({"list": []})})
        return Message(content, reply_to=message)

    result = federate(app, FedPM(), torch.nn.Linear(3, 2), 3, wrap=UplinkMeter)
    assert torch.equal(result.arrays.to_torch_state_dict()["weight"], torch.ones(2, 3))


def test_those_that_flower_cannot_reach_are_named(caplog: pytest.LogCaptureFixture) -> None:
    inline = InlineGrid(reply_app(4), 3, {}, seed=3)
    ordered = PartitionOrderedGrid(Slow(inline, {}, lost=1), 0)
    list(ordered.get_node_ids())
    with caplog.at_level(logging.WARNING, "flwr"):
        found = list(StreamingGrid(ordered).send_and_receive(requests(inline)))
    lost = sorted(inline.get_node_ids())[1]
    assert len(found) == 2
    assert f"nodes that could not be reached: {lost} (partition {ordered.partition_of(lost)})" in caplog.text


def test_an_error_of_the_superlinks_comes_as_the_nodes() -> None:
    """Flower gives it node 1, whoever is gone."""
    inline = InlineGrid(reply_app(4), 3, {}, seed=3)
    gone = sorted(inline.get_node_ids())[2]
    replies = list(StreamingGrid(Slow(inline, {}, gone=gone)).send_and_receive(requests(inline)))
    assert [reply.has_error() for reply in replies] == [False, False, True]
    assert replies[2].metadata.src_node_id == gone


class Matrix(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1800, 1800))


def test_what_nobody_asked_for_is_passed_over() -> None:
    """The SuperLink may send along messages of other sorts."""

    class Odd(WrappedGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            replies = list(self.inner.pull_messages(message_ids))
            return [*(Message(RecordDict(), dst_node_id=1, message_type="query") for _ in replies), *replies]

    inline = InlineGrid(reply_app(4), 5, {}, seed=3)
    assert sorted(partitions(StreamingGrid(Odd(inline)).send_and_receive(requests(inline)))) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("strategy", "most"), [(FedPM, 2), (FedAvg, 9)])
def test_fedpm_holds_few_replies_whatever_their_number(strategy: type[FedAvg], most: int) -> None:
    """It folds them in one at a time, where a stock strategy makes a list of them."""
    grids: list[Slow] = []

    def wrap(grid: Grid) -> Grid:
        grids.append(Slow(grid, {}))
        return grids[0]

    result = federate(reply_app(1800), strategy(fraction_evaluate=0.0), Matrix(), 9, wrap=wrap, seed=1)
    assert torch.allclose(result.arrays.to_torch_state_dict()["w"], torch.full((1800, 1800), 4.0))
    assert grids[0].most_alive <= most
    assert strategy is FedPM or grids[0].most_alive == most


def test_a_wrapper_of_flowers_that_never_calls_our_start_gets_a_list() -> None:
    """Differential privacy's goes through the replies twice."""
    strategy = DifferentialPrivacyServerSideFixedClipping(Guarded(), 0.0, 1e9, 4)
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        arrays = ArrayRecord({"weight": torch.full((2, 3), 5.0), "bias": torch.zeros(2)})
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    result = federate(app, strategy, torch.nn.Linear(3, 2), 4)
    assert torch.allclose(result.arrays.to_torch_state_dict()["weight"], torch.full((2, 3), 5.0))


def test_the_meter_counts_what_came_in_training() -> None:
    inline = InlineGrid(reply_app(10), 3, {}, seed=3)
    meter = UplinkMeter(inline)
    replies = list(StreamingGrid(meter).send_and_receive(requests(inline)))
    assert meter.bytes == sum(messages.count_bytes(reply.content) for reply in replies)
    before = meter.bytes
    PartitionOrderedGrid(meter, 0).get_node_ids()  # asks the nodes, by queries
    assert meter.bytes == before
