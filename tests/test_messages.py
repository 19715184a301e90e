"""Reading requests, and curvature."""

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedpm_flwr import messages, replies
from fedpm_flwr.curvature import Block, KroneckerRight, LayerCurvature
from fedpm_flwr.replies import ReplyError

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


@pytest.mark.parametrize("error", [RuntimeError("no convergence"), MemoryError("no memory")])
def test_curvature_that_cannot_be_checked_is_refused(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(curvature: KroneckerRight) -> None:
        raise error

    monkeypatch.setattr(KroneckerRight, "check_positive_definite", fail)
    layer = LayerCurvature(Block("head", ("w",)), KroneckerRight(torch.eye(2)), 0.1)
    with pytest.raises(ReplyError, match=f"its curvature: layer 'head': {error}"):
        replies._check_layer(layer, (0.0, 1.0))
