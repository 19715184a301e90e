"""A Grid that runs ClientApps in this process: for tests, debugging, and quick experiments.

Every message and context goes through Flower's own serialisation on its way, so that what works
here works over a network; node IDs are random, as they are there.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from flwr.app import Context, Error, Message, RecordDict, UserConfigValue
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import (
    context_from_proto,
    context_to_proto,
    message_from_proto,
    message_to_proto,
)
from flwr.proto.message_pb2 import Context as ProtoContext
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from .messages import NUM_PARTITIONS, PARTITION_ID

Client = Callable[[Message, Context], Message]
"""A ClientApp, or what is called like one."""

_ID_BITS = 63


class InlineGrid(Grid):
    """Runs each message's ClientApp when it is pushed; the reply waits to be pulled.

    An exception in a ClientApp becomes an error reply, as everywhere in Flower. Clients keep their
    ``context.state`` between messages.

    Args:
        client_app: what every node runs.
        num_supernodes: how many nodes there are; node i holds partition i.
        run_config: what ClientApps find in ``context.run_config``.
        seed: of the node IDs and of the order in which replies arrive; None: another each time.
    """

    def __init__(
        self,
        client_app: Client,
        num_supernodes: int,
        run_config: Mapping[str, UserConfigValue],
        seed: int | None = None,
    ) -> None:
        self._client_app = client_app
        self._random = random.Random(seed)
        self._run = Run.create_empty(self._random.getrandbits(_ID_BITS))
        self._replies: dict[str, bytes] = {}
        self._contexts: dict[int, bytes] = {}
        for partition in range(num_supernodes):
            node = self._random.getrandbits(_ID_BITS)
            config: dict[str, UserConfigValue] = {PARTITION_ID: partition, NUM_PARTITIONS: num_supernodes}
            context = Context(self._run.run_id, node, config, RecordDict(), dict(run_config))
            self._contexts[node] = context_to_proto(context).SerializeToString()

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """All nodes, in no particular order."""
        return self._random.sample(list(self._contexts), len(self._contexts))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Run each message's ClientApp; returns the messages' IDs."""
        return [self._process(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies to these messages, in random order, each once."""
        waiting = [self._replies.pop(key) for key in message_ids if key in self._replies]
        self._random.shuffle(waiting)
        return [message_from_proto(ProtoMessage.FromString(data)) for data in waiting]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push and pull; there is nothing to wait for, so ``timeout`` is not looked at."""
        return self.pull_messages(self.push_messages(messages))

    def _process(self, message: Message) -> str:
        key = f"{self._random.getrandbits(_ID_BITS):x}"
        message.metadata.__dict__["_message_id"] = key  # as Flower's own Grids set it
        request = message_from_proto(message_to_proto(message))
        node = request.metadata.dst_node_id
        context = context_from_proto(ProtoContext.FromString(self._contexts[node]))
        try:
            reply = message_to_proto(self._client_app(request, context))
        except Exception as error:  # whatever a ClientApp raises is the client's failure, not the run's
            reason = f"{type(error).__name__}: {error}"
            failure = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)
            reply = message_to_proto(Message(failure, reply_to=request))
        self._contexts[node] = context_to_proto(context).SerializeToString()
        self._replies[key] = reply.SerializeToString()
        return key


def run_inline(
    server_app: ServerApp,
    client_app: Client,
    num_supernodes: int,
    run_config: Mapping[str, UserConfigValue] | None = None,
    seed: int | None = None,
) -> None:
    """Run a ServerApp to its end over an ``InlineGrid``; what it raises is raised here."""
    config = dict(run_config or {})
    grid = InlineGrid(client_app, num_supernodes, config, seed)
    with task_identity(grid.run.run_id):
        server_app(grid, Context(grid.run.run_id, SUPERLINK_NODE_ID, {}, RecordDict(), config))


@contextmanager
def task_identity(run_id: int) -> Iterator[None]:
    """Inside, messages can be made: Flower stamps them with its task process's identity, which others lack."""
    before = (TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 0, run_id, SUPERLINK_NODE_ID
    try:
        yield
    finally:
        TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = before
