"""Grids around a Grid: what they share, replies one at a time, and a count of what clients send."""

import logging
import time
from collections.abc import Iterable, Iterator
from itertools import count, islice

from flwr.app import Message, MessageType, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from .events import event
from .messages import SERVER_ROUND, count_bytes
from .report import PREFIX

_SHORTEST_WAIT_S, _LONGEST_WAIT_S = 0.05, 1.0
_FIRST_NOTICE_S = 60.0
"""After so many seconds without a reply, and after twice as many, and so on, a warning says whose it is."""
_AHEAD_BYTES = 32 << 20
_MOST_AHEAD = 10_000
_MOST_NAMED = 20
"""Nodes that one warning names."""
_log = logging.getLogger("flwr")


class WrappedGrid(Grid):
    """A Grid that does what another does, but for what a subclass overrides.

    ``outgoing`` and ``incoming`` see all messages, by whichever method they come and go.
    """

    def __init__(self, grid: Grid) -> None:
        self.inner = grid

    def outgoing(self, messages: Iterable[Message]) -> Iterable[Message]:
        """The messages as they are to be sent."""
        return messages

    def incoming(self, reply: Message) -> Message:
        """A reply as it is to be received."""
        return reply

    def set_run(self, run: Run) -> None:
        self.inner.set_run(run)

    @property
    def run(self) -> Run:
        return self.inner.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return self.inner.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return self.inner.get_nodes()

    def get_node_ids(self) -> Iterable[int]:
        return self.inner.get_node_ids()

    def partition_of(self, node: int) -> int | None:
        """The partition of a node, if a Grid further in knows it."""
        known = getattr(self.inner, "partition_of", None)
        partition: int | None = known(node) if known else None
        return partition

    def bytes_of(self, reply: Message) -> int:
        """The bytes of a reply as it was sent, if a Grid further in knows them; else as it is here."""
        known = getattr(self.inner, "bytes_of", None)
        return known(reply) if known else count_bytes(reply.content)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self.inner.push_messages(self.outgoing(messages))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._received(self.inner.pull_messages(message_ids))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self._received(self.inner.send_and_receive(self.outgoing(messages), timeout=timeout))

    def _received(self, replies: Iterable[Message]) -> list[Message]:
        waiting, received = list(replies)[::-1], []
        while waiting:  # each is let go of before the next, so that no two forms of all are held
            received.append(self.incoming(waiting.pop()))
        return received


class StreamingGrid(WrappedGrid):
    """Gives replies one at a time, in the order of their requests, and holds few that are not yet asked for.

    Flower's own Grids hold all replies of a round until the last is there. Here they wait on the SuperLink
    until their turn; of those further on, no more are pulled than fit into 32 MB. Who has not replied after
    ``timeout`` seconds is left out, and named in a warning. An error that the SuperLink replies in place of a
    node comes as that node's.

    For strategies that go through the replies once, as every ``Guarded`` one does.

    Args:
        grid: the Grid to send by.
        at_once: give a list, when the last reply is there: for what goes through them more than once.
    """

    def __init__(self, grid: Grid, *, at_once: bool = False) -> None:
        super().__init__(grid)
        self._at_once = at_once

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push all messages; what is returned pulls the replies as it is gone through."""
        replies = self._pulled(messages, timeout)
        return list(replies) if self._at_once else replies

    def _pulled(self, messages: Iterable[Message], timeout: float | None) -> Iterator[Message]:
        requests = list(messages)
        ids: list[str | None] = list(self.push_messages(requests))
        if len(ids) != len(requests):  # some Grids leave out what could not be pushed, others say None of it
            known = set(ids)
            ids = [key if (key := request.metadata.message_id) in known else None for request in requests]
        nodes = [request.metadata.dst_node_id for request in requests]
        pushed = {key: node for key, node in zip(ids, nodes, strict=True) if key is not None}
        server_round = _round_of(requests)
        self._name(
            server_round,
            [node for key, node in zip(ids, nodes, strict=True) if key is None],
            "could not be reached",
        )
        size = max((count_bytes(request.content) for request in requests), default=0)
        return self._replies(pushed, size, server_round, time.monotonic(), timeout)

    def _replies(
        self, waiting: dict[str, int], size: int, server_round: int | None, start: float, timeout: float | None
    ) -> Iterator[Message]:
        """Of these messages, given with their nodes, in this order; ``size``: of the largest request."""
        ahead: dict[str, Message] = {}
        silent: list[int] = []
        largest, wait, notice = 0, _SHORTEST_WAIT_S, _FIRST_NOTICE_S
        for turn_number in count():
            if not waiting:
                break
            is_late = timeout is not None and time.monotonic() >= start + timeout
            window = max(1, min(_MOST_AHEAD, _AHEAD_BYTES // max(largest, 1)))
            turn = [key for key in islice(waiting, window) if key not in ahead]
            if not largest and turn:  # how large replies are is unknown yet: one at a time, whoever has the first
                turn = [turn[0 if is_late else turn_number % len(turn)]]
            for reply in self.pull_messages(turn):
                if (key := reply.metadata.reply_to_message_id) in waiting:
                    ahead[key] = reply
                    if reply.has_content():  # errors are small, and say nothing of the others
                        largest = max(largest, size, count_bytes(reply.content), 1)
                        self._received_from(waiting[key], reply, server_round, time.monotonic() - start)
                del reply  # else it would be held until the next
            tried = set(turn)
            all_came = ahead.keys() >= tried  # so that more may be there
            while waiting and ((first := next(iter(waiting))) in ahead or (is_late and first in tried)):
                node = waiting.pop(first)
                if first in ahead:
                    wait = _SHORTEST_WAIT_S
                    yield _as_from(node, ahead.pop(first))
                else:
                    silent.append(node)
            if waiting and not is_late and not all_came:
                passed = time.monotonic() - start
                if passed >= notice:
                    notice = 2 * passed
                    self._still_waits_for(waiting[first], server_round, passed)
                time.sleep(wait if timeout is None else min(wait, max(timeout - passed, 0)))
                wait = min(2 * wait, _LONGEST_WAIT_S)
        self._name(server_round, silent, f"did not reply within {timeout} s")

    def _received_from(self, node: int, reply: Message, server_round: int | None, seconds: float) -> None:
        size, partition = self.bytes_of(reply), self.partition_of(node)
        facts = event(
            "reply", round=server_round, node=node, partition=partition, bytes=size, seconds=round(seconds, 3)
        )
        text = "%s%sreply of %s: %d bytes, %.1f s after the request"
        _log.debug(text, PREFIX, _in_round(server_round), self._place(node), size, seconds, extra=facts)

    def _still_waits_for(self, node: int, server_round: int | None, seconds: float) -> None:
        facts = event(
            "waiting", round=server_round, node=node, partition=self.partition_of(node), seconds=round(seconds, 3)
        )
        text = "%s%sno reply of node %s for %.0f s, still waiting"
        _log.warning(text, PREFIX, _in_round(server_round), self._place(node), seconds, extra=facts)

    def _name(self, server_round: int | None, nodes: list[int], what: str) -> None:
        if nodes:
            named = ", ".join(self._place(node) for node in nodes[:_MOST_NAMED])
            more = f" and {len(nodes) - _MOST_NAMED} more" if len(nodes) > _MOST_NAMED else ""
            partitions = [self.partition_of(node) for node in nodes]
            facts = event("silent", round=server_round, nodes=nodes, partitions=partitions, reason=what)
            text = "%s%sleft out the nodes that %s: %s%s"
            _log.warning(text, PREFIX, _in_round(server_round), what, named, more, extra=facts)

    def _place(self, node: int) -> str:
        partition = self.partition_of(node)
        return f"{node}" if partition is None else f"{node} (partition {partition})"


class UplinkMeter(WrappedGrid):
    """Counts the bytes of training replies, usable or not, in however many exchanges a round has."""

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self.bytes = 0
        """Of all that clients have sent in training so far."""
        self._sizes: dict[str, int] = {}

    def bytes_of(self, reply: Message) -> int:
        return self._sizes.get(reply.metadata.reply_to_message_id) or super().bytes_of(reply)

    def outgoing(self, messages: Iterable[Message]) -> Iterable[Message]:
        self._sizes.clear()  # of the exchange before
        return messages

    def incoming(self, reply: Message) -> Message:
        if reply.has_content():
            size = self._sizes[reply.metadata.reply_to_message_id] = count_bytes(reply.content)
            if reply.metadata.message_type.split(".")[0] == MessageType.TRAIN:
                self.bytes += size
        return reply


def _round_of(requests: list[Message]) -> int | None:
    """Of which round they are, if they say so: questions asked before the first do not."""
    for config in (config for request in requests[:1] for config in request.content.config_records.values()):
        if isinstance(number := config.get(SERVER_ROUND), int):
            return number
    return None


def _in_round(server_round: int | None) -> str:
    return "" if server_round is None else f"round {server_round}: "


def _as_from(node: int, reply: Message) -> Message:
    if reply.has_error():
        reply.metadata.__dict__["_src_node_id"] = node  # there is no other way to set it
    return reply
