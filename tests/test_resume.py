"""A run that broke off and was taken up again ends where an uninterrupted one does, to the last bit."""

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, Krum, Strategy
from safetensors.torch import load_file, save_file
from torch import Tensor

import client_app
import server_app
from fedpm_flwr import checkpoint, messages, report
from fedpm_flwr.checkpoint import Checkpoint, Checkpoints
from fedpm_flwr.checkpointed import Checkpointed
from fedpm_flwr.config import ALGORITHMS, UPDATES, Config
from fedpm_flwr.durable import DamagedFileError
from fedpm_flwr.inline import Client, InlineGrid, run_inline, task_identity
from fedpm_flwr.packing import PackedGrid, packed_arrays
from fedpm_flwr.report import Row, RunReport
from fedpm_flwr.reproducible import PartitionOrderedGrid
from fedpm_flwr.strategy import FedPM

ROUNDS = 5
Settings = Mapping[str, object]


class PowerCutError(Exception):
    """Nobody catches it."""


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture takes as long as such a run, and nobody looks at these."""
    monkeypatch.setattr(report, "plot_curves", lambda *_: None)


def run(folder: Path, settings: Settings, client: Client = client_app.app, **more: object) -> None:
    given = {
        "dataset": "breast-cancer",
        "model": "linear",
        "local-steps": 2,
        "learning-rate": 0.3,
        "alpha": 1.0,
        "num-server-rounds": ROUNDS,
        "output": str(folder),
        "state-folder": str(folder.parent / "state"),
        **settings,
        **more,
    }
    run_inline(server_app.app, client, 4, Config.from_run_config(given).to_run_config())


def losing(lost: Mapping[int, Sequence[int]]) -> Client:
    """Clients whose replies to training get lost: by round, the partitions."""

    def client(message: Message, context: Context) -> Message:
        reply = client_app.app(message, context)
        is_train = message.metadata.message_type == MessageType.TRAIN
        if is_train and messages.partition_of(context)[0] in lost.get(messages.server_round_of(message), ()):
            raise ConnectionError("the reply is lost")
        return reply

    return client


def break_off(
    folder: Path, settings: Settings, in_round: int, every: int = 2, client: Client = client_app.app
) -> None:
    """A run whose server dies after the clients of this round have replied."""
    add_round = RunReport.add_round

    def dying(self: RunReport, server_round: int, metrics: Mapping[str, int | float]) -> Row:
        if server_round == in_round:
            raise PowerCutError
        return add_round(self, server_round, metrics)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunReport, "add_round", dying)
        patch.setattr(RunReport, "close", lambda _: None)  # who has died ends nothing in order
        with pytest.raises(PowerCutError):
            run(folder, settings, client, **{"checkpoint-every": every})


def rows(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "metrics.json").read_text())
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found]


def check_same(one: Path, other: Path) -> None:
    models = [load_file(folder / "model.safetensors") for folder in (one, other)]
    for key, value in models[0].items():
        assert torch.equal(value, models[1][key]), key
    assert rows(one) == rows(other)
    assert [row["round"] for row in rows(one)] == list(range(ROUNDS + 1))


CASES: dict[str, Settings] = {name: {"algorithm": name} for name in ALGORITHMS} | {
    "half": {"fraction-train": 0.5, "fraction-evaluate": 0.5},
    "half corrected": {"algorithm": "fedpm-corrected", "fraction-train": 0.5, "local-steps": 0, "batch-size": 0},
    "half scaffold": {"algorithm": "scaffold", "fraction-train": 0.5},
    "half fednl": {"algorithm": "fednl", "fraction-train": 0.5},
    "half fednew": {"algorithm": "fednew", "fraction-train": 0.5, "fednew-refresh": 2},
    "fresh": {"algorithm": "fedpm-corrected", "correction": "fresh"},
    "int8": {"update": "int8", "codec": "auto"},
    "personal": {"algorithm": "pfedsop", "fraction-evaluate": 1.0},
    "momentum": {"algorithm": "fedavgm", "server-momentum": 0.9},
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_taken_up_again_is_the_uninterrupted_run(case: str, tmp_path: Path) -> None:
    """The clients are two rounds ahead of the checkpoint, as they are when a server dies."""
    settings = CASES[case]
    run(tmp_path / "whole" / "run", settings)
    broken, resumed = tmp_path / "broken" / "run", tmp_path / "broken" / "resumed"
    break_off(broken, settings, in_round=4)
    run(resumed, settings, resume=str(broken))
    check_same(tmp_path / "whole" / "run", resumed)


STATEFUL = ("fedpm-corrected", "scaffold", "fednl", "fednew", "pfedsop")


@pytest.mark.parametrize("algorithm", STATEFUL)
def test_likewise_where_a_client_lost_its_last_replies_before_the_checkpoint(
    algorithm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What the server counts on then is older than the client's last two states."""
    settings, client = {"algorithm": algorithm}, losing({2: [1], 3: [1, 2]})
    run(tmp_path / "whole" / "run", settings, client)
    broken = tmp_path / "broken" / "run"
    break_off(broken, settings, in_round=5, every=3, client=client)
    run(broken, settings, client, resume=str(broken))
    check_same(tmp_path / "whole" / "run", broken)
    assert "the client goes on without it" not in caplog.text


@pytest.mark.parametrize("case", [*STATEFUL, "half corrected", "int8"])
def test_several_runs_begin_at_one_checkpoint(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """None takes from the others what clients keep; one of them is itself taken up by another."""
    settings: Settings = {**CASES[case], "checkpoint-keep": 1}
    run(tmp_path / "whole" / "run", settings)
    broken = tmp_path / "broken" / "run"
    break_off(broken, settings, in_round=3)
    for name, changed in (("other", {"learning-rate": 0.01}), ("one", {})):
        run(tmp_path / "broken" / name, {**settings, **changed, "checkpoint-every": 1}, resume=str(broken))
    check_same(tmp_path / "whole" / "run", tmp_path / "broken" / "one")
    child = tmp_path / "broken" / "child"
    break_off(child, {**settings, "resume": str(broken)}, in_round=4, every=1)
    run(tmp_path / "broken" / "grandchild", {**settings, "checkpoint-every": 1}, resume=str(child))
    check_same(tmp_path / "whole" / "run", tmp_path / "broken" / "grandchild")
    assert "the client goes on without it" not in caplog.text


def test_checkpoints_hold_all_that_the_server_needs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Their folder may be taken elsewhere, and the first one is not needed once a run has begun at it."""
    settings = CASES["half corrected"]
    run(tmp_path / "whole" / "run", settings)
    broken, first = tmp_path / "broken" / "run", tmp_path / "broken" / "moved"
    break_off(broken, settings, in_round=4)
    assert not list((tmp_path / "broken" / "state").rglob("server-*"))
    broken.rename(first)
    second, third = tmp_path / "broken" / "second", tmp_path / "broken" / "third"
    kept = next((first / "checkpoints" / "states").rglob("server-*"))
    (kept / f"9.safetensors.{'0' * 32}.part").mkdir()  # somebody is writing there
    break_off(second, {**settings, "resume": str(first)}, in_round=4, every=1)
    assert not list((second / "checkpoints").rglob("*.part"))
    assert (second / "checkpoints" / "states").stat().st_mode & 0o777 == 0o700
    shutil.rmtree(first)
    run(third, settings, resume=str(second))
    check_same(tmp_path / "whole" / "run", third)
    assert "the client goes on without it" not in caplog.text


def test_in_the_same_folder_twice_and_after_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"algorithm": "scaffold", "checkpoint-every": 1}
    run(tmp_path / "whole" / "run", settings)
    broken = tmp_path / "broken" / "run"
    break_off(broken, settings, in_round=3, every=1)
    break_off(broken, {**settings, "resume": str(broken), "output": ""}, in_round=4, every=1)
    run(broken, settings, resume=str(broken), output="")
    check_same(tmp_path / "whole" / "run", broken)
    told = capsys.readouterr().out
    assert "taken up after round 2 of" in told
    assert "taken up after round 3 of" in told
    assert not (broken / "checkpoints" / "states").exists(), "nothing to copy: nothing is made"
    model = (broken / "model.safetensors").read_bytes()
    run(broken, {**settings, "damping": 0.5}, resume=str(broken), output="")  # there is nothing left to do
    assert (broken / "model.safetensors").read_bytes() == model
    assert "damping=0.5, where the run had 0.1" in capsys.readouterr().out


def test_more_rounds_than_were_meant(tmp_path: Path) -> None:
    run(tmp_path / "whole" / "run", {})
    run(tmp_path / "short" / "run", {"num-server-rounds": 3, "checkpoint-every": 2})
    assert Checkpoints(tmp_path / "short" / "run" / "checkpoints").rounds() == [2, 3]
    run(tmp_path / "short" / "more", {}, resume=str(tmp_path / "short" / "run"))
    check_same(tmp_path / "whole" / "run", tmp_path / "short" / "more")


@pytest.mark.parametrize("damage", ["truncated", "bit", "empty"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_used(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With states of clients that are ahead of it by several rounds."""
    settings = {"algorithm": "fedpm-corrected"}
    run(tmp_path / "whole" / "run", settings)
    broken = tmp_path / "broken" / "run"
    break_off(broken, settings, in_round=4, every=1)
    path = broken / "checkpoints" / "round-3.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes({"truncated": bytes(data[:-9]), "bit": bytes(data), "empty": b""}[damage])
    run(broken, {**settings, "checkpoint-every": 1}, resume=str(broken), output="")
    check_same(tmp_path / "whole" / "run", broken)
    assert "a checkpoint cannot be used, the one before it is: " in caplog.text
    assert str(path) in caplog.text
    Checkpoints(broken / "checkpoints").read(3)  # the round was run again, and written anew


def test_what_cannot_be_taken_up_is_refused(tmp_path: Path) -> None:
    done = tmp_path / "run"
    run(done, {"num-server-rounds": 1, "checkpoint-every": 1})
    settings = (done / "config.toml").read_text()
    with pytest.raises(ValueError, match="holds checkpoints of a run: resume it, or begin"):
        run(done, {"checkpoint-every": 1})
    with pytest.raises(RuntimeError, match="size mismatch for"):
        run(done, {"dataset": "digits"}, resume=str(done))
    assert (done / "config.toml").read_text() == settings
    run(tmp_path / "other", {"num-server-rounds": 2, "checkpoint-every": 1})
    with pytest.raises(ValueError, match="holds checkpoints of a run"):
        run(tmp_path / "other", {"checkpoint-every": 1}, resume=str(done))
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*elsewhere/checkpoints of checkpoints"):
        run(tmp_path / "b", {}, resume=str(tmp_path / "elsewhere"))
    with pytest.raises(ValueError, match="the checkpoint is of the strategy FedPM, not Scaffold"):
        run(tmp_path / "c", {"algorithm": "scaffold"}, resume=str(done))
    with pytest.raises(ValueError, match=r"it remembers .*'variates'"):
        Checkpointed(_Forgetful(), tmp_path / "d", resume=done / "checkpoints")
    with pytest.raises(RuntimeError, match="size mismatch for"):
        run(tmp_path / "e", {"dataset": "digits"}, resume=str(done))
    with pytest.raises(ValueError, match="resume='here' is not an absolute path"):
        run(tmp_path / "f", {}, resume="here")
    for path in (done / "checkpoints").iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(FileNotFoundError, match=r"holds no checkpoint that can be read \(round-NUMBER"):
        run(tmp_path / "g", {}, resume=str(done))


class _Forgetful(FedPM):
    def remembered(self) -> dict[str, Any]:
        return {"experiment": self.experiment}


_Forgetful.__name__ = "FedPM"


def theta(value: float = 0.0) -> ArrayRecord:
    return ArrayRecord({"w": torch.full((2,), value), "n": torch.tensor(3)})


def stepping(message: Message, context: Context) -> Message:
    """A client that adds its partition and one, whatever the strategy."""
    if message.metadata.message_type == messages.PARTITION_QUERY:
        return messages.partition_reply(message, context)
    arrays = message.content.array_records["arrays"].to_torch_state_dict()
    arrays["w"] = arrays["w"] + messages.partition_of(context)[0] + 1
    metrics = MetricRecord({"num-examples": 1, "sum": float(arrays["w"].sum())})
    reply = Message(RecordDict({"metrics": metrics}), reply_to=message)
    if message.metadata.message_type == "train":
        reply.content["arrays"] = ArrayRecord(arrays)
    return reply


def rounding(message: Message, context: Context) -> Message:
    """A client like it, whose changes do not fit into 8 or 16 bits."""

    def uneven(message: Message, context: Context) -> Message:
        reply = stepping(message, context)
        for record in reply.content.array_records.values():
            record["w"] = Array(record["w"].numpy() * np.array([1.0, 0.337], np.float32))
        return reply

    return packed_arrays(message, context, uneven)


STOCK: dict[str, Callable[[], Strategy]] = {
    "FedAvg": FedAvg,
    "FedAvgM": lambda: FedAvgM(server_momentum=0.5),
    "FedAdam": FedAdam,
}


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("name", STOCK)
def test_flowers_own_strategies_likewise(name: str, update: str, tmp_path: Path) -> None:
    seeds = count()  # of the IDs of runs and nodes

    def start(strategy: Strategy, rounds: int) -> Any:
        grid = InlineGrid(rounding, 3, {"state-folder": str(tmp_path / "state")}, seed=next(seeds))
        with task_identity(grid.run.run_id):
            return strategy.start(
                grid=PartitionOrderedGrid(PackedGrid(grid, update), 0),
                initial_arrays=theta(),
                num_rounds=rounds,
                evaluate_fn=lambda r, arrays: MetricRecord({"round": r, "w": arrays["w"].numpy().tolist()}),
            )

    whole = start(STOCK[name](), 5)
    first, second = tmp_path / "first", tmp_path / "second"
    start(Checkpointed(STOCK[name](), first, every=2), 3)  # clients are then ahead of the checkpoint
    (first / "round-3.safetensors").unlink()
    start(Checkpointed(STOCK[name](), second, resume=first), 3)
    resumed = start(Checkpointed(STOCK[name](), second, resume=second), 5)
    assert np.array_equal(whole.arrays["w"].numpy(), resumed.arrays["w"].numpy())
    for history in ("train_metrics_clientapp", "evaluate_metrics_clientapp", "evaluate_metrics_serverapp"):
        assert getattr(whole, history) == getattr(resumed, history), history


def test_of_an_unknown_strategy_the_model_alone_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Checkpointed(Krum(), tmp_path)
    assert "checkpoints lack what Krum keeps between rounds, which is unknown" in caplog.text


def test_another_model_is_refused(tmp_path: Path) -> None:
    Checkpoints(tmp_path).write(Checkpoint(1, theta(), "FedAvg", {"experiment": "run", "forked_from": []}))
    strategy = Checkpointed(FedAvg(), tmp_path, resume=tmp_path)
    grid = InlineGrid(stepping, 2, {})
    for other, told in (
        (ArrayRecord({"w": torch.zeros(2)}), r"'n' is \[\] in it, missing here"),
        (
            ArrayRecord({"w": torch.zeros(3), "n": torch.tensor(3)}),
            r"'w' is \[2\] in it, \[3\] here",
        ),
    ):
        with pytest.raises(ValueError, match=f"the checkpoint is of another model: {told}"):
            strategy.start(grid=grid, initial_arrays=other)


def test_a_checkpoint_of_an_earlier_version_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One that has no record of the runs that its run was forked from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(checkpoint._KIND, "version", "1")
        Checkpoints(tmp_path).write(Checkpoint(1, theta(), "FedPM", {"experiment": "run", "failed_rounds": 0}))
    with pytest.raises(FileNotFoundError, match="holds no checkpoint that can be read"):
        Checkpointed(FedPM(), tmp_path, resume=tmp_path)
    assert """it says {"format": "fedpm-flwr checkpoint", "version": "1"}, not""" in caplog.text


def test_whatever_a_strategy_remembers_comes_back(tmp_path: Path) -> None:
    memory: dict[str, Any] = {
        "none": None,
        "numbers": [True, 3, 0.1, float("inf"), -0.0],
        "text": "é\n",
        "bytes": [b"\x00\xff", b""],
        "by client": {2**63: (1, 2.5), 0: (2, 0.5)},
        "tensors": {"a/b": torch.tensor([1.0, torch.nan], dtype=torch.bfloat16), "empty": torch.zeros(0, 3)},
        "arrays": [np.arange(6.0).reshape(2, 3), np.array(True)],
        "records": [theta(1.5), ConfigRecord({"b": b"x", "l": [1, 2]}), MetricRecord({"m": [0.5]})],
        "nested": {"a": {"b": torch.ones(1)}},
    }
    store = Checkpoints(tmp_path)
    store.write(Checkpoint(7, theta(2.0), "S", memory, exchanges=9, settings={"alpha": 0.5}))
    back = store.newest()
    assert (back.server_round, back.strategy, back.exchanges, back.settings) == (7, "S", 9, {"alpha": 0.5})
    assert torch.equal(back.arrays.to_torch_state_dict()["w"], torch.full((2,), 2.0))
    assert back.arrays["n"].numpy().dtype == np.int64
    for name in ("none", "numbers", "text", "bytes", "by client"):
        assert back.memory[name] == memory[name]
    assert list(back.memory["by client"]) == [2**63, 0]
    assert type(back.memory["by client"][0]) is tuple
    mixed = back.memory["tensors"]["a/b"]
    assert mixed.dtype == torch.bfloat16
    assert torch.equal(mixed.isnan(), torch.tensor([False, True]))
    assert back.memory["tensors"]["empty"].shape == (0, 3)
    one, two = back.memory["arrays"]
    assert np.array_equal(one, np.arange(6.0).reshape(2, 3))
    assert (two.dtype, two.shape, two.item()) == (np.dtype(bool), (), True)
    assert [type(record) for record in back.memory["records"]] == [ArrayRecord, ConfigRecord, MetricRecord]
    assert back.memory["records"][1:] == memory["records"][1:]
    assert torch.equal(back.memory["nested"]["a"]["b"], torch.ones(1))


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="memory/a/1: a object cannot be written into a checkpoint"):
        Checkpoints(tmp_path).write(Checkpoint(1, theta(), "S", {"a": [1, object()]}))
    assert not list(tmp_path.iterdir())


def test_the_newest_are_kept(tmp_path: Path) -> None:
    (tmp_path / "round-x.safetensors").write_bytes(b"not ours")
    store = Checkpoints(tmp_path, keep=2)
    for number in (2, 4, 10):
        store.write(Checkpoint(number, theta(), "S", {}))
    assert store.rounds() == [4, 10]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "round-10.safetensors",
        "round-4.safetensors",
        "round-x.safetensors",
    ]


def test_the_one_just_written_is_kept_whatever_there_is_of_later_rounds(tmp_path: Path) -> None:
    """As where later ones were damaged, and fewer are kept than before."""
    for number in (6, 8, 10):
        Checkpoints(tmp_path).write(Checkpoint(number, theta(), "S", {}))
    (tmp_path / "round-10.safetensors").write_bytes(b"damaged")
    store = Checkpoints(tmp_path, keep=1)
    assert store.newest().server_round == 8
    store.write(Checkpoint(9, theta(9.0), "S", {}))
    assert store.rounds() == [9]
    assert store.newest().server_round == 9


def test_every_bit_of_a_checkpoint_counts(tmp_path: Path) -> None:
    """Whichever one changes, it is told: never are other numbers read."""
    store = Checkpoints(tmp_path)
    store.write(Checkpoint(1, theta(1.0), "S", {"a": torch.ones(2)}))
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    generator = np.random.default_rng(0)
    for place in generator.choice(len(data), 200, replace=False):
        changed = bytearray(data)
        changed[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(changed)
        with pytest.raises((DamagedFileError, OSError)):
            store.read(1)
    for length in range(0, len(data), 37):
        path.write_bytes(data[:length])
        with pytest.raises((DamagedFileError, OSError)):
            store.read(1)


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path / "whole" / "run", {})

    def full(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        if path.parent.parent.name == "checkpoints":
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)

    folder = tmp_path / "full" / "run"
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "flwr"):
        patch.setattr("fedpm_flwr.durable.save_file", full)
        run(folder, {"checkpoint-every": 1})
    assert caplog.text.count("no checkpoint, those before it stand: [Errno 28] No space left on device") == ROUNDS
    assert not list((folder / "checkpoints").iterdir())
    check_same(tmp_path / "whole" / "run", folder)


@pytest.mark.parametrize("argument", ["every", "keep"])
def test_arguments(argument: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{argument} must be >= 1, not 0"):
        Checkpointed(FedAvg(), tmp_path, every=int(argument != "every"), keep=int(argument != "keep"))
