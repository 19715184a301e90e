"""Changes in few bits: what rounding leaves out is not lost, and comes back to nobody else."""

import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedpm_flwr import messages
from fedpm_flwr.inline import InlineGrid, task_identity
from fedpm_flwr.packing import PackedGrid, packed_arrays

from .loop import ZERO, Loop, exchange, moving, train_message


@pytest.fixture(autouse=True)
def _identity() -> Iterator[None]:
    with task_identity(1):
        yield


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


@pytest.mark.parametrize("update", ["int8", "bfloat16"])
def test_a_single_number_has_changes_too(update: str, tmp_path: Path) -> None:
    """As a learned temperature, or the count of batches that a stock strategy has averaged."""
    grid = PackedGrid(Loop(moving({"t": torch.tensor(0.5)}), {"state-folder": str(tmp_path)}), update)
    (reply,) = exchange(grid, ArrayRecord({"t": torch.tensor(2.0), "n": torch.tensor(3.0, dtype=torch.float64)}))
    found = reply.content.array_records["arrays"].to_torch_state_dict()
    assert torch.equal(found["t"], torch.tensor(2.5))
    assert torch.equal(found["n"], torch.tensor(3.0, dtype=torch.float64))


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
