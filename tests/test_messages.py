"""Reading requests."""

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedpm_flwr import messages

from .test_inline import exchange


def test_a_request_without_a_round_or_a_codec() -> None:
    """``exchange`` sends a config that names neither."""
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        assert messages.asked_codec(message) is None
        messages.server_round_of(message)
        return Message(RecordDict({"c": ConfigRecord()}), reply_to=message)

    for reply in exchange(app)[0]:
        assert reply.error.reason == "ValueError: the request names no 'server-round' as a whole number"
