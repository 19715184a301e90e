"""One array per dtype on the wire, ordinary arrays for whoever looks, and changes of which nothing is lost."""

import json
import logging
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
from fedpm_flwr.grids import UplinkMeter, WrappedGrid
from fedpm_flwr.inline import InlineGrid, task_identity
from fedpm_flwr.packing import PACKED, PackedGrid, PackingError, packed_arrays
from fedpm_flwr.strategy import FedPM

from .apps import federate, ordered, regression_client, tell_partitions

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


def train_message(content: RecordDict) -> Message:
    return Message(content, dst_node_id=1, message_type="train")


@pytest.fixture(autouse=True)
def _identity() -> Iterator[None]:
    with task_identity(1):
        yield


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

    federate(app, FedPM(max_failed_rounds=2), make_model(), 2, wrap=PackedGrid)
    assert "mods=[fedpm_flwr.packing.packed_arrays]" in caplog.text


def test_a_server_without_the_grid_sees_what_it_always_did() -> None:
    app = ClientApp(mods=[packed_arrays])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": state(make_model()), "metrics": metrics}), reply_to=message)

    assert list(federate(app, FedAvg(), make_model(), 2).arrays) == list(make_model().state_dict())


def moving(changes: dict[str, torch.Tensor]) -> Callable[[Message, Context], Message]:
    """A client whose arrays have changed by so much, whatever was sent."""

    def client(message: Message, context: Context) -> Message:
        before = message.content.array_records["arrays"].to_torch_state_dict()
        after = {key: value + changes[key] if key in changes else value for key, value in before.items()}
        return Message(RecordDict({"arrays": ArrayRecord(after)}), reply_to=message)

    return client


@pytest.mark.parametrize(("update", "error"), [("int8", 1 / 254), ("bfloat16", 2**-8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_what_rounding_leaves_out_comes_with_the_next_change(
    update: str, error: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    """The changes that arrive add up to the true ones, but for the last one's rounding."""
    torch.manual_seed(0)
    theta = {"a": torch.zeros(30, 5, dtype=dtype), "b": torch.zeros(7, dtype=dtype), "n": torch.tensor(3)}
    changes = {"a": torch.randn(30, 5, dtype=dtype), "b": 1e-3 * torch.randn(7, dtype=dtype), "n": torch.tensor(2)}
    grid = PackedGrid(Loop(moving(changes), {"state-folder": str(tmp_path)}), update)
    arrived = {key: torch.zeros_like(value, dtype=torch.float64) for key, value in theta.items()}
    for _ in range(12):
        (reply,) = exchange(grid, ArrayRecord(theta))
        found = reply.content.array_records["arrays"].to_torch_state_dict()
        assert {key: value.dtype for key, value in found.items()} == {
            key: value.dtype for key, value in theta.items()
        }
        for key in theta:
            arrived[key] += found[key].double()
    for key in ("a", "b"):
        largest = float(changes[key].abs().max())
        worst = float((arrived[key] - 12 * changes[key].double()).abs().max())
        assert worst <= 1.01 * error * largest * (1 + error) + 24 * torch.finfo(dtype).eps * largest
    assert int(arrived["n"]) == 12 * 5


def test_arrays_that_torch_does_not_know_travel_as_they_are(tmp_path: Path) -> None:
    swapped = Array(np.array([1.5, 2.5], dtype=">f4"))

    def client(message: Message, context: Context) -> Message:
        return Message(RecordDict({"arrays": ArrayRecord({"a": swapped})}), reply_to=message)

    (reply,) = exchange(
        PackedGrid(Loop(client, {"state-folder": str(tmp_path)}), "int8"), ArrayRecord({"a": swapped})
    )
    assert reply.content.array_records["arrays"]["a"].data == swapped.data


@pytest.mark.parametrize(("update", "share"), [("int8", 0.25), ("bfloat16", 0.5)])
def test_bytes(update: str, share: float, tmp_path: Path) -> None:
    theta = {f"layer.{i}.weight": torch.zeros(100, 100) for i in range(4)}
    loop = Loop(moving({key: torch.randn(100, 100) for key in theta}), {"state-folder": str(tmp_path)})
    exchange(PackedGrid(loop, update), ArrayRecord(theta))
    plain = sum(value.numel() * 4 for value in theta.values())
    assert messages.count_bytes(loop.received[0]) < share * plain + 1000


def test_a_change_that_is_not_finite_is_seen_as_it_is(tmp_path: Path) -> None:
    theta = {"a": torch.zeros(3), "b": torch.zeros(3)}
    spoilt = {"a": torch.tensor([1.0, torch.nan, 2.0]), "b": torch.ones(3)}
    grid = PackedGrid(Loop(moving(spoilt), {"state-folder": str(tmp_path)}), "int8")
    for _ in range(2):  # nor is anything of it left for the next time
        (reply,) = exchange(grid, ArrayRecord(theta))
        found = reply.content.array_records["arrays"].to_torch_state_dict()
        assert found["a"][[0, 2]].tolist() == [1.0, 2.0]
        assert torch.isnan(found["a"][1])
        assert torch.equal(found["b"], torch.ones(3))


def test_state_that_cannot_be_kept_costs_what_was_left_out_and_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    grid = PackedGrid(Loop(moving({"a": torch.arange(3.0)}), {"state-folder": str(tmp_path / "file")}), "int8")
    with caplog.at_level(logging.WARNING, "flwr"):
        (reply,) = exchange(grid, ArrayRecord({"a": torch.zeros(3)}))
    found = reply.content.array_records["arrays"].to_torch_state_dict()
    assert torch.allclose(found["a"], torch.arange(3.0), atol=0.01)
    assert "what rounding leaves out of a change could not be kept, and is lost" in caplog.text


def test_evaluation_replies_are_never_rounded(tmp_path: Path) -> None:
    grid = PackedGrid(Loop(moving({"a": torch.tensor([0.3, 1.0])}), {"state-folder": str(tmp_path)}), "int8")
    content = RecordDict({"arrays": ArrayRecord({"a": torch.zeros(2)})})
    (reply,) = grid.send_and_receive([Message(content, dst_node_id=1, message_type="evaluate")])
    assert torch.equal(reply.content.array_records["arrays"].to_torch_state_dict()["a"], torch.tensor([0.3, 1.0]))


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


def test_requests_that_nobody_replies_to_are_not_remembered_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Silent(Loop):
        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
            return super().send_and_receive(messages)[:1]

    monkeypatch.setattr("fedpm_flwr.packing._KEPT_BYTES", 3000)
    grid = PackedGrid(Silent(moving({}), {"state-folder": str(tmp_path)}), "int8")
    for _ in range(30):
        exchange(grid, ArrayRecord({"a": torch.zeros(200)}), count=3)
    assert 2 <= len(grid._requests) <= 10


def test_every_message_has_its_own_request(tmp_path: Path) -> None:
    """Pushed one by one, each with another model, and pulled together."""
    app = ClientApp(mods=[packed_arrays])
    app.train()(moving({"a": torch.tensor([1.0, 0.5])}))
    inline = InlineGrid(app, 8, {"state-folder": str(tmp_path)}, seed=1)
    grid = PackedGrid(inline, "int8")
    ids: list[str] = []
    for number, node in enumerate(inline.get_node_ids()):
        content = RecordDict({"arrays": ArrayRecord({"a": torch.full((2,), float(number))})})
        ids += grid.push_messages([Message(content, dst_node_id=node, message_type="train")])
    replies = list(grid.pull_messages(ids))
    found = [reply.content.array_records["arrays"]["a"].numpy().tolist() for reply in replies]
    assert sorted(found)[:7:3] == [pytest.approx([n + 1, n + 0.5], abs=0.01) for n in (0, 3, 6)]
    assert grid._requests == {}


def of_node(
    folder: Path, client: Callable[[Message, Context], Message], node: int = 1, run: int = 7
) -> PackedGrid:
    loop = Loop(client, {"state-folder": str(folder)})
    loop.context = Context(run, node, {}, RecordDict(), loop.context.run_config)
    return PackedGrid(loop, "int8")


def arrived(grid: Grid, arrays: ArrayRecord, name: str = "arrays") -> torch.Tensor:
    (reply,) = exchange(grid, arrays)
    return reply.content.array_records[name].to_torch_state_dict()["a"]


ZERO = ArrayRecord({"a": torch.zeros(2)})
ODD = torch.tensor([1.0, 0.301])
"""The second is 38.23 of the 127 parts of the first: 38 arrive, then 38, then 39."""


@pytest.mark.parametrize(("node", "run"), [(2, 7), (1, 8)])
def test_nodes_and_runs_have_each_their_own_rest(node: int, run: int, tmp_path: Path) -> None:
    first = arrived(of_node(tmp_path, moving({"a": ODD})), ZERO)
    arrived(of_node(tmp_path, moving({"a": ODD})), ZERO)
    assert torch.equal(arrived(of_node(tmp_path, moving({"a": ODD}), node, run), ZERO), first)
    assert not torch.equal(arrived(of_node(tmp_path, moving({"a": ODD})), ZERO), first)


def test_a_reply_without_arrays_leaves_the_rest_for_the_next(tmp_path: Path) -> None:
    """As where gradients are asked for between two trainings."""

    def told(message: Message, context: Context) -> Message:
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

    total = torch.zeros(2)
    for _ in range(20):
        exchange(of_node(tmp_path, told), ZERO)
        total += arrived(of_node(tmp_path, moving({"a": ODD})), ZERO)
    assert torch.allclose(total, 20 * ODD, atol=1 / 127)


def test_what_a_diverged_change_left_out_does_not_come_back(tmp_path: Path) -> None:
    arrived(of_node(tmp_path, moving({"a": torch.tensor([1e15, 3e14])})), ZERO)
    assert torch.allclose(arrived(of_node(tmp_path, moving({"a": ODD})), ZERO), ODD, atol=0.01)


def test_a_client_may_change_the_record_that_it_got(tmp_path: Path) -> None:
    def client(message: Message, context: Context) -> Message:
        record = message.content.array_records["arrays"]
        record["a"] = Array(record["a"].numpy() + 1)
        return Message(RecordDict({"arrays": record}), reply_to=message)

    assert arrived(of_node(tmp_path, client), ZERO).tolist() == [1, 1]


def test_empty_arrays_have_no_change(tmp_path: Path) -> None:
    """In the second exchange as in the first, which has left nothing."""
    empty = ArrayRecord({"a": torch.zeros(2), "none": torch.zeros(0, 3)})
    for _ in range(2):
        (reply,) = exchange(of_node(tmp_path, moving({"a": ODD})), empty)
        assert reply.has_content()
        assert reply.content.array_records["arrays"]["none"].shape == (0, 3)


def test_changes_are_of_the_record_of_the_same_name(tmp_path: Path) -> None:
    def client(message: Message, context: Context) -> Message:
        return Message(RecordDict({"arrays": ArrayRecord({"a": ODD})}), reply_to=message)

    content = RecordDict({"variates": ArrayRecord({"a": torch.full((2,), 1000.0)}), "arrays": ZERO})
    (reply,) = of_node(tmp_path, client).send_and_receive([train_message(content)])
    found = reply.content.array_records["arrays"].to_torch_state_dict()["a"]
    assert torch.allclose(found, ODD, atol=0.005)


def test_nothing_is_added_to_a_change_that_was_clipped(tmp_path: Path) -> None:
    content = RecordDict({"arrays": ZERO, "config": ConfigRecord({"clipping_norm": 0.1})})
    for _ in range(3):
        list(of_node(tmp_path, moving({"a": ODD})).send_and_receive([train_message(content)]))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_variances_stay_positive(tmp_path: Path) -> None:
    variances = torch.tensor([1e-4, 5.0, 1e-3])
    old = ArrayRecord({"a": torch.tensor([2e-4, 1.0, 0.5])})

    def client(message: Message, context: Context) -> Message:
        return Message(RecordDict({"arrays": ArrayRecord({"a": variances})}), reply_to=message)

    assert (arrived(of_node(tmp_path, client), old) >= 0).all()


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
