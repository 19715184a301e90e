"""The same run from the same seed, under any strategy, whatever Flower's random node IDs are."""

import logging
import random
from collections import Counter
from collections.abc import Iterable

from flwr.app import Message, MetricRecord, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

from . import messages
from .grids import StreamingGrid, WrappedGrid
from .report import PREFIX, one_line

_MAX_TRIES = 3
_log = logging.getLogger("flwr")


class PartitionOrderedGrid(WrappedGrid):
    """A Grid whose node IDs, and replies to ``send_and_receive``, are in the order of the nodes' partitions.

    Node IDs are random, replies arrive in any order, and Flower samples nodes with Python's global
    generator. Here each new node is asked for its partition (three times, if it does not say), nodes
    and replies are sorted by it (the silent ones last, by ID), and the global generator is seeded,
    from the seed and the number of exchanges so far, whenever a strategy looks up nodes to sample
    from. Sampling and the order of summation are then functions of the seed.

    Clients answer the question with ``messages.partition_reply``, within ``timeout`` seconds.
    """

    def __init__(self, grid: Grid, seed: int, timeout: float = 600.0) -> None:
        super().__init__(grid)
        self._seed, self._timeout = seed, timeout
        self.exchanges = 0
        """How many there have been; a run that is taken up again counts on."""
        self._partitions: dict[int, int] = {}
        self._tries: Counter[int] = Counter()

    def get_nodes(self) -> Iterable[NodeInfo]:
        return sorted(self.inner.get_nodes(), key=lambda node: self._place(node.node_id))

    def get_node_ids(self) -> list[int]:
        """All nodes in the order of their partitions; seeds Python's global generator."""
        nodes = list(self.inner.get_node_ids())
        unknown = [node for node in nodes if node not in self._partitions and self._tries[node] < _MAX_TRIES]
        if unknown:
            self._ask(unknown)
            self._warn(nodes)
        random.seed(f"{self._seed}/{self.exchanges}")
        return sorted(nodes, key=self._place)

    def partition_of(self, node: int) -> int | None:
        """The partition that a node says it holds."""
        return self._partitions.get(node)

    def outgoing(self, messages: Iterable[Message]) -> Iterable[Message]:
        self.exchanges += 1
        return messages

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Replies in the order of the partitions they come from."""
        replies = super().send_and_receive(messages, timeout=timeout)
        return sorted(replies, key=lambda reply: self._place(reply.metadata.src_node_id))

    def _place(self, node: int) -> tuple[float, int]:
        partition = self._partitions.get(node)
        return (float("inf") if partition is None else partition, node)

    def _ask(self, nodes: list[int]) -> None:
        queries = [
            Message(RecordDict(), dst_node_id=node, message_type=messages.PARTITION_QUERY) for node in nodes
        ]
        self._tries.update(nodes)
        for reply in StreamingGrid(self.inner).send_and_receive(queries, timeout=self._timeout):
            if reply.has_content():
                metrics = reply.content.metric_records.get(messages.METRICS, MetricRecord())
                answer = metrics.get(messages.PARTITION_ID)
                if isinstance(answer, int):
                    self._partitions[reply.metadata.src_node_id] = answer
            else:
                node, reason = reply.metadata.src_node_id, one_line(reply.error.reason)
                _log.warning("%snode %d does not say its partition: %s", PREFIX, node, reason)

    def _warn(self, nodes: list[int]) -> None:
        """``nodes``: all that there are now; a SuperNode that comes back may do so under a new ID."""
        known = [self._partitions[node] for node in nodes if node in self._partitions]
        if silent := sum(node not in self._partitions and self._tries[node] == _MAX_TRIES for node in nodes):
            _log.warning("%s%d nodes do not say their partition: results depend on node IDs", PREFIX, silent)
        if len(set(known)) < len(known):
            _log.warning("%sseveral nodes hold the same partition: results depend on node IDs", PREFIX)
