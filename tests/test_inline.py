"""The inline Grid treats messages, contexts and failures as a network would."""

from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.task_identity import TaskIdentity

from fedpm_flwr.inline import run_inline


def exchange(client_app: ClientApp, nodes: int = 2, times: int = 1) -> list[list[Message]]:
    """Send one query to every node, so many times; the replies of each time."""
    app, replies = ServerApp(), list[list[Message]]()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        for _ in range(times):
            asked = [
                Message(RecordDict({"c": ConfigRecord({"x": 1})}), dst_node_id=node, message_type="query")
                for node in grid.get_node_ids()
            ]
            replies.append(list(grid.send_and_receive(asked)))

    run_inline(app, client_app, nodes, {"greeting": "hello"})
    return replies


def test_every_node_gets_its_own_copy_and_keeps_its_state() -> None:
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        assert context.run_config == {"greeting": "hello"}
        assert message.content.config_records["c"]["x"] == 1
        message.content.config_records["c"]["x"] = 2  # must not reach the other node
        seen = context.state.config_records.get("seen", ConfigRecord({"n": 0}))
        number, partition = seen["n"], context.node_config["partition-id"]
        assert isinstance(number, int)
        context.state["seen"] = ConfigRecord({"n": number + 1})
        content = ConfigRecord({"p": partition, "n": number + 1})
        return Message(RecordDict({"r": content}), reply_to=message)

    replies = exchange(app, nodes=3, times=2)
    for number, answers in enumerate(replies, start=1):
        assert {a.content.config_records["r"]["p"] for a in answers} == {0, 1, 2}
        assert all(a.content.config_records["r"]["n"] == number for a in answers)


def test_an_exception_becomes_an_error_reply() -> None:
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        raise OSError("no such disk")

    for reply in exchange(app)[0]:
        assert reply.has_error()
        assert reply.error.reason == "OSError: no such disk"


def test_a_reply_that_cannot_be_serialised_is_an_error_reply() -> None:
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Any:
        return "not a message"

    assert all(reply.has_error() for reply in exchange(app)[0])


def test_flowers_task_identity_is_put_back() -> None:
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return Message(RecordDict(), reply_to=message)

    exchange(app)
    with pytest.raises(RuntimeError, match="not set"):
        _ = TaskIdentity.run_id
