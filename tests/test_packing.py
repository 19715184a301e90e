"""One array per dtype on the wire, and ordinary arrays for whoever looks."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    FedAdam,
    FedAvg,
    FedMedian,
    Krum,
    Strategy,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from fedpm_flwr import messages
from fedpm_flwr.grids import UplinkMeter
from fedpm_flwr.guarded import FailedRoundsError
from fedpm_flwr.inline import task_identity
from fedpm_flwr.packing import PACKED, PackedGrid, PackingError, packed_arrays
from fedpm_flwr.strategy import FedPM

from .apps import federate, ordered, regression_client, tell_partitions
from .loop import ZERO, Loop, exchange, moving, train_message

NUMBERS = ["float32", "float64", "float16", "int64", "int8", "uint8", "bool", "complex64", ">f4"]


KEYS = st.text(min_size=1, max_size=20)


ARRAYS = st.dictionaries(
    KEYS,
    st.sampled_from(NUMBERS).flatmap(
        lambda dtype: arrays_of.arrays(
            dtype, arrays_of.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
        )
    ),
    min_size=1,
    max_size=8,
)


def state(model: torch.nn.Module) -> ArrayRecord:
    return ArrayRecord(model.state_dict())


def make_model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers = (torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    return torch.nn.Sequential(*layers)


@pytest.fixture(autouse=True)
def _identity() -> Iterator[None]:
    with task_identity(1):
        yield


@settings(max_examples=60)
@given(ARRAYS, ARRAYS)
def test_there_and_back_is_what_was_sent(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    sent = RecordDict(
        {
            "arrays": ArrayRecord({key: Array(value) for key, value in first.items()}),
            "more": ArrayRecord({key: Array(value) for key, value in second.items()}),
            "config": ConfigRecord({"lr": 0.1}),
        }
    )
    seen: list[RecordDict] = []

    def client(message: Message, context: Context) -> Message:
        seen.append(message.content)
        return Message(message.content, reply_to=message)

    loop = Loop(client)
    (reply,) = PackedGrid(loop).send_and_receive([train_message(sent)])
    for content in (seen[0], reply.content):
        assert list(content) == list(sent)
        for name, record in sent.array_records.items():
            again = content.array_records[name]
            assert list(again) == list(record)
            for key, array in record.items():
                assert (again[key].dtype, again[key].shape, again[key].data) == (
                    array.dtype,
                    array.shape,
                    array.data,
                )
    for content in (*loop.sent, *loop.received):
        for name, kept in (("arrays", first), ("more", second)):
            assert len(content.array_records[name]) == len({str(value.dtype) for value in kept.values()})


def test_messages_that_share_a_record_share_the_packed_one() -> None:
    """As all requests of a round do: Flower sends what is the same object once."""
    loop = Loop(lambda message, context: Message(RecordDict(), reply_to=message))
    exchange(PackedGrid(loop), state(make_model()), count=3)
    assert len({id(content.array_records["arrays"]) for content in loop.sent}) == 1


def test_what_is_no_number_travels_as_it_is() -> None:
    text = ArrayRecord({"names": Array(np.array(["a", "bc"]))})
    loop = Loop(lambda message, context: Message(message.content, reply_to=message))
    (reply,) = exchange(PackedGrid(loop), text)
    assert reply.content.array_records["arrays"]["names"].numpy().tolist() == ["a", "bc"]


@pytest.mark.parametrize(
    "strategy",
    [
        FedAvg,
        FedAdam,
        FedMedian,
        Krum,
        FedPM,
        lambda: DifferentialPrivacyClientSideFixedClipping(FedAvg(), 0.1, 1.0, 4),
    ],
    ids=["FedAvg", "FedAdam", "FedMedian", "Krum", "FedPM", "DP"],
)
def test_every_strategy_gives_the_same_bits_as_without(strategy: Callable[[], Strategy]) -> None:
    """And ClientApps, mods after this one and results see ordinary arrays."""

    def data(partition: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(partition)
        return torch.randn(8, 3, generator=generator), torch.randn(8, 2, generator=generator)

    def run(packed: bool) -> tuple[dict[str, torch.Tensor], int]:
        client = regression_client(data, make_model, lr=0.1, damping=0.1)
        app = ClientApp(mods=[packed_arrays, fixedclipping_mod] if "DP" in str(strategy) else [packed_arrays])

        @app.train()
        def train(message: Message, context: Context) -> Message:
            assert list(message.content.array_records["arrays"]) == list(make_model().state_dict())
            assert PACKED not in message.content
            return client(message, context)

        @app.evaluate()
        def evaluate(message: Message, context: Context) -> Message:
            assert list(message.content.array_records["arrays"]) == list(make_model().state_dict())
            return messages.metrics_reply(message, {"num-examples": 1, "loss": 0.5})

        tell_partitions(app)
        meters: list[UplinkMeter] = []

        def wrap(grid: Grid) -> Grid:
            meters.append(UplinkMeter(grid))
            return ordered(PackedGrid(meters[0]) if packed else meters[0])

        np.random.seed(0)  # of the noise of differential privacy
        result = federate(app, strategy(), make_model(), 4, rounds=2, wrap=wrap, seed=1)
        assert result.evaluate_metrics_clientapp[2]["loss"] == 0.5
        return dict(result.arrays.to_torch_state_dict()), meters[0].bytes

    (plain, bytes_plain), (packed, bytes_packed) = run(False), run(True)
    assert list(plain) == list(packed)
    assert all(torch.equal(plain[key], packed[key]) for key in plain)
    assert 0 < bytes_packed < bytes_plain


def test_a_client_without_the_mod_says_that_it_needs_it(caplog: pytest.LogCaptureFixture) -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        make_model().load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        raise AssertionError

    with pytest.raises(FailedRoundsError, match="no round gave a new model"):
        federate(app, FedPM(max_failed_rounds=2), make_model(), 2, wrap=PackedGrid)
    assert "mods=[fedpm_flwr.packing.packed_arrays]" in caplog.text


def test_a_server_without_the_grid_sees_what_it_always_did() -> None:
    app = ClientApp(mods=[packed_arrays])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": state(make_model()), "metrics": metrics}), reply_to=message)

    assert list(federate(app, FedAvg(), make_model(), 2).arrays) == list(make_model().state_dict())


def test_an_unknown_update_is_refused() -> None:
    loop = Loop(lambda message, context: Message(RecordDict(), reply_to=message))
    with pytest.raises(ValueError, match="unknown update 'int4'; allowed: none, bfloat16, int8"):
        PackedGrid(loop, "int4")
    grid = PackedGrid(loop)
    grid._update = "int4"  # as a newer server would ask
    with pytest.raises(PackingError, match="unknown update 'int4'; allowed: none, bfloat16, int8"):
        exchange(grid, ArrayRecord({"a": torch.zeros(2)}))


def spoilt(
    change: Callable[[list[list[object]], dict[str, np.ndarray]], None],
) -> Callable[[RecordDict], RecordDict]:
    """A packed reply with other entries, or other arrays."""

    def spoil(content: RecordDict) -> RecordDict:
        layouts = json.loads(str(content.config_records[PACKED]["layouts"]))
        lines = {key: array.numpy().copy() for key, array in content.array_records["arrays"].items()}
        change(layouts["arrays"], lines)
        said = ConfigRecord({"layouts": json.dumps(layouts), "update": "none"})
        lined = ArrayRecord({key: Array(value) for key, value in lines.items()})
        return RecordDict({**content, "arrays": lined, PACKED: said})

    return spoil


def set_entry(place: int, value: object) -> Callable[[list[list[object]], dict[str, np.ndarray]], None]:
    def change(entries: list[list[object]], lines: dict[str, np.ndarray]) -> None:
        entries[0][place] = value

    return change


HOSTILE: dict[str, Callable[[RecordDict], RecordDict]] = {
    "too few numbers": spoilt(set_entry(2, [10**12, 10**12])),
    "too many numbers": spoilt(set_entry(2, [1])),
    "negative": spoilt(set_entry(2, [-3, -5])),
    "bool": spoilt(set_entry(2, [True, 15])),
    "dtype": spoilt(set_entry(1, "float64")),
    "object": spoilt(set_entry(1, "object")),
    "update": spoilt(set_entry(3, "int4")),
    "no unit": spoilt(set_entry(4, "one")),
    "key": spoilt(set_entry(0, "other")),
    "no key": spoilt(set_entry(0, None)),
    "twice": spoilt(lambda entries, lines: entries.append(entries[0])),
    "an entry more": spoilt(lambda entries, lines: entries.append(["c", "float32", [2]])),
    "an entry less": spoilt(lambda entries, lines: entries.clear()),
    "the same key twice": spoilt(lambda entries, lines: entries.__setitem__(1, entries[0])),
    "matrix": spoilt(lambda entries, lines: lines.update({k: v.reshape(1, -1) for k, v in lines.items()})),
    "no layouts": lambda content: RecordDict({**content, PACKED: ConfigRecord({"update": "none"})}),
    "no JSON": lambda content: RecordDict({**content, PACKED: ConfigRecord({"layouts": "{" * 9999})}),
    "bytes": lambda content: RecordDict({**content, PACKED: ConfigRecord({"layouts": b"\xff"})}),
    "list": lambda content: RecordDict({**content, PACKED: ConfigRecord({"layouts": "[1]"})}),
    "no record": lambda content: RecordDict({**content, PACKED: ConfigRecord({"layouts": '{"x": []}'})}),
    "no array": lambda content: RecordDict(
        {**content, "arrays": ArrayRecord({"x": Array("float32", (3,), "numpy.ndarray", b"nothing")})}
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_packed_arrays_that_cannot_be_read_leave_their_reply_out(what: str, tmp_path: Path) -> None:
    theta = {"a": torch.zeros(3, 5), "b": torch.zeros(4)}

    class Spoiling(Loop):
        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
            (reply,) = super().send_and_receive(messages)
            reply.content = HOSTILE[what](reply.content)
            return [reply]

    for update in ("none", "int8"):
        client = moving({"a": torch.ones(3, 5)})
        (reply,) = exchange(
            PackedGrid(Spoiling(client, {"state-folder": str(tmp_path)}), update), ArrayRecord(theta)
        )
        if reply.has_error():
            assert str(reply.error.reason).startswith("its packed arrays cannot be read: ")
        else:  # what only a comparison with the model can tell
            assert what in ("key", "update", "no unit")
            assert update == "none" or what == "key"


def test_arrays_that_are_not_numpys_travel_as_they_are(tmp_path: Path) -> None:
    trees = ArrayRecord({"trees": Array("uint8", (3,), "xgboost-json", b"{}")})

    def client(message: Message, context: Context) -> Message:
        return Message(RecordDict({"arrays": message.content.array_records["arrays"]}), reply_to=message)

    for update in ("none", "int8"):
        (reply,) = exchange(PackedGrid(Loop(client, {"state-folder": str(tmp_path)}), update), trees)
        assert reply.content.array_records["arrays"]["trees"].data == b"{}"


def test_a_list_of_more_arrays_than_any_model_has_is_refused() -> None:
    def client(message: Message, context: Context) -> Message:
        return Message(RecordDict({"arrays": ZERO}), reply_to=message)

    class Many(Loop):
        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
            (reply,) = super().send_and_receive(messages)
            entries = [[f"{number}", "float32", [0]] for number in range(20_001)]
            reply.content[PACKED] = ConfigRecord({"layouts": json.dumps({"arrays": entries})})
            return [reply]

    (reply,) = exchange(PackedGrid(Many(client)), ZERO)
    assert str(reply.error.reason).endswith("20001 arrays, more than the 20000 allowed")
