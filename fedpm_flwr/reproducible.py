"""The same run from the same seed, under any strategy, whatever Flower's random node IDs are."""

import logging
import random
from collections import Counter
from collections.abc import Iterable

from flwr.app import Message, MessageType, MetricRecord, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from . import messages
from .report import PREFIX

_QUERY_TIMEOUT_S = 600.0
_MAX_TRIES = 3
_log = logging.getLogger("flwr")


class PartitionOrderedGrid(Grid):
    """A Grid whose node IDs, and replies to ``send_and_receive``, are in the order of the nodes' partitions.

    Node IDs are random, replies arrive in any order, and Flower samples nodes with Python's global
    generator. Here each new node is asked for its partition (three times, if it does not say), nodes
    and replies are sorted by it (the silent ones last, by ID), and the global generator is seeded,
    from the seed and the number of exchanges so far, whenever a strategy looks up nodes to sample
    from. Sampling and the order of summation are then functions of the seed.

    Clients answer the question with ``messages.partition_reply``.
    """

    def __init__(self, grid: Grid, seed: int) -> None:
        self._grid = grid
        self._seed = seed
        self._exchanges = 0
        self.uplink_bytes = 0
        """Of all that clients have sent in training so far, usable or not, in however many exchanges a round."""
        self._partitions: dict[int, int] = {}
        self._tries: Counter[int] = Counter()

    def set_run(self, run: Run) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return sorted(self._grid.get_nodes(), key=lambda node: self._place(node.node_id))

    def get_node_ids(self) -> list[int]:
        """All nodes in the order of their partitions; seeds Python's global generator."""
        nodes = list(self._grid.get_node_ids())
        self._ask([n for n in nodes if n not in self._partitions and self._tries[n] < _MAX_TRIES])
        random.seed(f"{self._seed}/{self._exchanges}")
        return sorted(nodes, key=self._place)

    def partition_of(self, node: int) -> int | None:
        """The partition that a node says it holds."""
        return self._partitions.get(node)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Replies in the order of the partitions they come from."""
        replies = self._grid.send_and_receive(messages, timeout=timeout)
        replies = list(replies)
        self._exchanges += 1
        self.uplink_bytes += sum(_train_bytes(reply) for reply in replies)
        return sorted(replies, key=lambda reply: self._place(reply.metadata.src_node_id))

    def _place(self, node: int) -> tuple[float, int]:
        partition = self._partitions.get(node)
        return (float("inf") if partition is None else partition, node)

    def _ask(self, nodes: list[int]) -> None:
        if not nodes:
            return
        queries = [
            Message(RecordDict(), dst_node_id=node, message_type=messages.PARTITION_QUERY) for node in nodes
        ]
        self._tries.update(nodes)
        for reply in self._grid.send_and_receive(queries, timeout=_QUERY_TIMEOUT_S):
            if reply.has_content():
                metrics = reply.content.metric_records.get(messages.METRICS, MetricRecord())
                answer = metrics.get(messages.PARTITION_ID)
                if isinstance(answer, int):
                    self._partitions[reply.metadata.src_node_id] = answer
        self._warn(nodes)

    def _warn(self, nodes: list[int]) -> None:
        silent = [node for node in nodes if node not in self._partitions and self._tries[node] == _MAX_TRIES]
        if silent:
            _log.warning("%s%d nodes do not say their partition: results depend on node IDs", PREFIX, len(silent))
        if len(set(self._partitions.values())) < len(self._partitions):
            _log.warning("%sseveral nodes hold the same partition: results depend on node IDs", PREFIX)


def _train_bytes(reply: Message) -> int:
    is_train = reply.metadata.message_type.split(".")[0] == MessageType.TRAIN
    return messages.count_bytes(reply.content) if is_train and reply.has_content() else 0
