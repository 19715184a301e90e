"""A Grid that hands messages to a ClientApp with the mod ``packed_arrays``, without a run around it."""

from collections.abc import Callable, Iterable

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid

from fedpm_flwr.grids import WrappedGrid
from fedpm_flwr.packing import packed_arrays


def train_message(content: RecordDict) -> Message:
    return Message(content, dst_node_id=1, message_type="train")


class Loop(WrappedGrid):
    """Hands each message to a ClientApp as it comes from further out, without a run around it."""

    def __init__(
        self, client: Callable[[Message, Context], Message], run_config: dict[str, str] | None = None
    ) -> None:
        self.client = client
        self.context = Context(7, 1, {}, RecordDict(), {**(run_config or {})})
        self.sent: list[RecordDict] = []
        self.received: list[RecordDict] = []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        replies = []
        for number, message in enumerate(messages):
            message.metadata.__dict__["_message_id"] = f"{len(self.sent)}-{number}"
            self.sent.append(message.content)
            replies.append(packed_arrays(message, self.context, self.client))
            if replies[-1].has_content():
                self.received.append(replies[-1].content)
        return replies


def exchange(grid: Grid, arrays: ArrayRecord, count: int = 1) -> list[Message]:
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": 1})})
    return list(grid.send_and_receive([train_message(content) for _ in range(count)]))


def moving(changes: dict[str, torch.Tensor]) -> Callable[[Message, Context], Message]:
    """A client whose arrays have changed by so much, whatever was sent."""

    def client(message: Message, context: Context) -> Message:
        before = message.content.array_records["arrays"].to_torch_state_dict()
        after = {key: value + changes[key] if key in changes else value for key, value in before.items()}
        return Message(RecordDict({"arrays": ArrayRecord(after)}), reply_to=message)

    return client


ZERO = ArrayRecord({"a": torch.zeros(2)})
