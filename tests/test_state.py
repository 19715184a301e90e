"""What a client keeps: whole files, few of them, and none that is believed without being read."""

import logging
import os
import random
import shutil
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedpm_flwr.state import ClientState, default_folder


def one(value: float) -> dict[str, torch.Tensor]:
    return {"c": torch.full((2, 3), value, dtype=torch.float64)}


def test_what_is_saved_is_loaded_by_round(tmp_path: Path) -> None:
    state = ClientState(tmp_path, "run", "client-1")
    assert state.load() == {}
    state.save(1, one(1.5))
    state.save(2, one(2.5))
    again = ClientState(tmp_path, "run", "client-1")
    assert torch.equal(again.load(1)["c"], one(1.5)["c"])
    assert torch.equal(again.load()["c"], one(2.5)["c"])
    assert again.load(3) == {}
    assert ClientState(tmp_path, "run", "client-2").load() == {}
    assert ClientState(tmp_path, "other", "client-1").load() == {}


def test_the_last_two_rounds_and_the_last_eight_runs_are_kept(tmp_path: Path) -> None:
    for run in range(11):
        state = ClientState(tmp_path, f"run-{run}", "a")
        for number in (1, 2, 10):
            state.save(number, one(number))
        assert state.rounds() == [2, 10]
    assert len(list(tmp_path.iterdir())) == 8
    assert ClientState(tmp_path, "run-10", "a").rounds() == [2, 10]
    assert not list(tmp_path.rglob("*.part"))


def test_the_round_that_is_counted_on_is_kept(tmp_path: Path) -> None:
    state = ClientState(tmp_path, "run", "a")
    for number in range(1, 6):
        state.save(number, one(number), counted=2)
    assert state.rounds() == [2, 4, 5]
    state.save(6, one(6), counted=5)
    assert state.rounds() == [5, 6]


def test_what_a_run_that_is_taken_up_again_counts_on_is_kept_and_no_more(tmp_path: Path) -> None:
    """Against a server that says what it counts on: rounds, lost replies and checkpoints drawn at random."""
    drawn = random.Random(0)
    most = most_uncounted = 0
    for case in range(50):
        lives = count(1)
        run, origins = "life-0", list[tuple[str, int]]()
        number, counted, newest = 0, 0, 0
        checkpoints: dict[int, tuple[str, list[tuple[str, int]], int, int]] = {}
        for _ in range(25):
            number += 1
            if drawn.random() < 0.6:  # the client takes part; maybe its reply is lost
                folder = tmp_path / str(case)
                state = ClientState(folder, run, "a", checkpoints=checkpoints, forked_from=origins)
                assert not counted or torch.equal(state.load(counted)["c"], one(counted)["c"])
                assert max(state.rounds(), default=0) == newest
                state.save(number, one(number), counted)
                before, newest = newest, number
                most = max(most, len(state.rounds()))
                other = ClientState(folder, run, "b", checkpoints=checkpoints, forked_from=origins)
                assert max((old for old in other.rounds() if old < number), default=0) == before
                other.save(number, one(number))
                most_uncounted = max(most_uncounted, len(other.rounds()))
                counted = number if drawn.random() < 0.5 else counted
            if drawn.random() < 0.5:
                checkpoints[number] = run, origins, counted, newest
                checkpoints = {old: checkpoints[old] for old in sorted(checkpoints)[-3:]}
            if checkpoints and drawn.random() < 0.15 and next(lives) < 6:  # the server dies, and goes on
                number = drawn.choice(list(checkpoints))
                checkpoints = {old: what for old, what in checkpoints.items() if old <= number}
                old_run, old_origins, counted, newest = checkpoints[number]
                run, origins = f"life-{next(lives)}", [(old_run, number), *old_origins]
    assert 4 < most <= 2 + 1 + 3 * 3
    assert 4 < most_uncounted <= 2 + 3 * 2


def test_without_a_new_checkpoint_states_do_not_grow(tmp_path: Path) -> None:
    for number in range(1, 30):
        state = ClientState(tmp_path, "run", "a", checkpoints=[3])
        state.save(number, one(number), counted=number - 1)
    assert state.rounds() == [3, 4, 28, 29]


def test_a_forked_run_has_states_of_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(1, 6):
        ClientState(tmp_path, "first", "a", checkpoints=[3, 4]).save(number, one(number), number - 1)
    first = {path: path.read_bytes() for path in (tmp_path / "first").rglob("*.safetensors")}

    def forked(last: int) -> ClientState:
        return ClientState(tmp_path, f"fork-{last}", "a", forked_from=[("none", 9), ("first", last), ("other", 1)])

    assert forked(3).rounds() == [3]
    assert forked(4).rounds() == [3, 4]
    assert not list(tmp_path.glob("fork-*"))  # nothing is written where nothing is to be kept
    forked(4).save(5, one(50.0), counted=4)
    forked(4).save(6, one(60.0), counted=4)
    assert forked(4).rounds() == [4, 5, 6]
    assert torch.equal(forked(4).load(5)["c"], one(50.0)["c"])
    assert torch.equal(forked(4).load(4)["c"], one(4.0)["c"])
    assert {path: path.read_bytes() for path in (tmp_path / "first").rglob("*.safetensors")} == first
    again = ClientState(tmp_path, "again", "a", forked_from=[("fork-4", 5), ("first", 4)])
    assert again.rounds() == [4, 5]
    assert not caplog.text
    assert forked(3).load(4) == {}
    assert "client state of round 4 is not in" in caplog.text
    with pytest.raises(ValueError, match=r"run name '\.\./x' is not allowed"):
        ClientState(tmp_path, "run", "a", forked_from=[("../x", 1)])


def test_the_run_that_another_begins_at_is_not_forgotten_then(tmp_path: Path) -> None:
    ClientState(tmp_path, "first", "a").save(1, one(1.0))
    for number in range(8):
        os.utime(tmp_path / "first", (0, 0))
        origins = [("first", 1)] if number == 7 else []
        ClientState(tmp_path, f"run-{number}", "a", forked_from=origins).save(2, one(2.0))
    assert ClientState(tmp_path, "run-7", "a").rounds() == [1, 2]


def test_a_run_taken_up_again_and_again_leaves_eight(tmp_path: Path) -> None:
    origins: list[tuple[str, int]] = []
    for number in range(1, 26):
        for client in ("a", "b"):
            state = ClientState(tmp_path, f"life-{number}", client, checkpoints=[number], forked_from=origins)
            assert state.rounds() == list(range(max(1, number - 2), number))
            state.save(number, one(number), counted=number - 1)
        origins = [(f"life-{number}", number), *origins]
    assert len(list(tmp_path.iterdir())) == 8


def test_what_a_run_needs_of_its_earlier_lives_is_kept_however_many_they_are(tmp_path: Path) -> None:
    """Where in each life another client takes part."""
    origins: list[tuple[str, int]] = []
    for number in range(1, 13):
        run = f"life-{number}"
        ClientState(tmp_path, run, f"c-{number}", forked_from=origins).save(number, one(number))
        origins = [(run, number), *origins]
    for number in range(1, 13):
        assert ClientState(tmp_path, "next", f"c-{number}", forked_from=origins).rounds() == [number]
    for number in range(1, 13):  # each takes part again: no earlier life is needed any more
        ClientState(tmp_path, "next", f"c-{number}", forked_from=origins).save(12 + number, one(number))
    for number in range(8):
        ClientState(tmp_path, f"other-{number}", "c-1").save(1, one(1.0))
    assert len(list(tmp_path.iterdir())) == 8


def test_a_run_is_not_forgotten_while_one_forked_from_it_needs_it(tmp_path: Path) -> None:
    """As b's state is in it alone, until b has taken part in the other."""
    for client in ("a", "b"):
        ClientState(tmp_path, "first", client).save(1, one(1.0))
    for number in range(12):
        ClientState(tmp_path, "fork", "a", forked_from=[("first", 1)]).save(2 + number, one(2.0))
        ClientState(tmp_path, f"other-{number}", "b").save(1, one(1.0))
    late = ClientState(tmp_path, "fork", "b", forked_from=[("first", 1)])
    assert late.rounds() == [1]
    late.save(14, one(2.0))
    for number in range(12, 20):
        ClientState(tmp_path, "fork", "a", forked_from=[("first", 1)]).save(2 + number, one(2.0))
        ClientState(tmp_path, f"other-{number}", "b").save(1, one(1.0))
    assert not (tmp_path / "first").exists()
    assert late.rounds() == [1, 14]


def test_nothing_stays_of_a_copy_that_was_broken_off(tmp_path: Path) -> None:
    ClientState(tmp_path, "first", "a").save(1, one(1.0))
    code = """
import os, shutil, signal, sys
from pathlib import Path
from fedpm_flwr.state import ClientState
copy = shutil.copy2
shutil.copy2 = lambda *places: (copy(*places), os.kill(os.getpid(), signal.SIGKILL))
ClientState(Path(sys.argv[1]), "fork", "a", forked_from=[("first", 1)]).save(2, {})
"""
    assert subprocess.run([sys.executable, "-c", code, tmp_path], check=False).returncode == -signal.SIGKILL
    assert list((tmp_path / "fork").rglob("*.safetensors"))
    fork = ClientState(tmp_path, "fork", "a", forked_from=[("first", 1)])
    assert fork.rounds() == [1]
    fork.save(2, one(2.0))
    assert sorted(path.name for path in (tmp_path / "fork").iterdir()) == [".fedpm-flwr-run", "a"]
    assert fork.rounds() == [1, 2]


def test_what_the_other_run_removes_meanwhile_is_not_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is copied is on the disk itself before it counts."""
    first = ClientState(tmp_path, "first", "a")
    for number in (1, 2):
        first.save(number, one(number))
    copy, flushed = shutil.copy2, list[str]()

    def late(path: Path, to: Path) -> object:
        (tmp_path / "first" / "a" / "1.safetensors").unlink(missing_ok=True)
        return copy(path, to)

    monkeypatch.setattr(shutil, "copy2", late)
    for module in ("durable", "state"):
        monkeypatch.setattr(f"fedpm_flwr.{module}.flush", lambda path: flushed.append(path.name))
    fork = ClientState(tmp_path, "fork", "a", forked_from=[("first", 2)])
    fork.save(3, one(3.0))
    assert fork.rounds() == [2, 3]
    assert flushed[:2] == ["2.safetensors", "a.part"]


def test_what_is_not_ours_is_never_deleted(tmp_path: Path) -> None:
    """The folder may be one that holds other things too, or lead elsewhere."""
    elsewhere = tmp_path / "elsewhere"
    ClientState(elsewhere, "run", "a").save(1, one(1.0))
    root = tmp_path / "root"
    for number in range(12):
        (root / f"precious-{number}").mkdir(parents=True)
        (root / f"precious-{number}" / "thesis.tex").write_text("years of work")
    (root / "link").symlink_to(elsewhere / "run")
    for run in range(12):
        ClientState(root, f"run-{run}", "a").save(1, one(1.0))
    assert len(list(root.glob("precious-*/thesis.tex"))) == 12
    assert len(list(root.glob("run-*"))) == 8
    assert torch.equal(ClientState(elsewhere, "run", "a").load()["c"], one(1.0)["c"])


def test_the_run_that_was_used_last_is_not_forgotten(tmp_path: Path) -> None:
    long = ClientState(tmp_path, "long", "a")
    for number in range(12):
        long.save(number, one(number))
        ClientState(tmp_path, f"short-{number}", "a").save(1, one(1.0))
    assert torch.equal(long.load()["c"], one(11.0)["c"])


def test_tensors_that_share_memory_are_kept(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    state = ClientState(tmp_path, "run", "a")
    state.save(1, {"whole": whole, "part": whole[2:4]})
    assert torch.equal(state.load()["part"], torch.tensor([2.0, 3.0]))


@pytest.mark.parametrize("damage", ["truncated", "empty", "other version", "other round", "not ours"])
def test_a_file_that_cannot_be_used_is_as_if_it_were_not_there(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = ClientState(tmp_path, "run", "a")
    state.save(1, one(1.0))
    (path,) = tmp_path.rglob("*.safetensors")
    metadata = {"format": "fedpm-flwr client state", "version": "1", "round": "1"}
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "not ours":
        save_file(one(1.0), path)
    else:
        key = damage.removeprefix("other ")
        save_file(one(1.0), path, {**metadata, key: "7"})
    with caplog.at_level(logging.WARNING, "flwr"):
        assert state.load() == {}
    assert "cannot be used, the client goes on without it" in caplog.text
    state.save(2, one(2.0))
    assert torch.equal(state.load()["c"], one(2.0)["c"])


@pytest.mark.parametrize("name", ["", "..", "a/b", "a b", "x" * 65, "ü"])
def test_names_cannot_lead_out_of_the_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run name .* is not allowed; allowed: 1 to 64 of"):
        ClientState(tmp_path, name, "a")
    with pytest.raises(ValueError, match=r"client name .* is not allowed"):
        ClientState(tmp_path, "run", name)


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = ClientState(tmp_path, "run", "a")
    state.save(1, one(1.0))

    def full(*arguments: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("fedpm_flwr.durable.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        state.save(2, one(2.0))
    assert state.rounds() == [1]
    assert not list(tmp_path.rglob("*.part"))


def test_the_default_folder_is_the_users_own_in_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert default_folder().parent == tmp_path
    ClientState(None, "run", "a").save(1, one(1.0))
    assert len(list(default_folder().rglob("*.safetensors"))) == 1
    assert default_folder().stat().st_mode & 0o777 == 0o700


def test_a_default_folder_that_leads_elsewhere_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another user may have made it, where all may write."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    default_folder().symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="is not a folder of this user's own; state-folder names another"):
        ClientState(None, "run", "a").save(1, one(1.0))
    assert not list((tmp_path / "elsewhere").iterdir())
    ClientState(tmp_path / "elsewhere", "run", "a").save(1, one(1.0))
    assert ClientState(None, "run", "a").load() == {}


def test_a_really_full_disk_is_an_os_error(tmp_path: Path) -> None:
    """In a process that may write no file of more than 4 KB."""
    code = """
import resource, signal, sys, torch
from pathlib import Path
from fedpm_flwr.state import ClientState
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
state = ClientState(Path(sys.argv[1]), "run", "a")
state.save(1, {"c": torch.zeros(9)})
try:
    state.save(2, {"c": torch.zeros(9999)})
except OSError as error:
    print("told:", error)
print(state.rounds())
"""
    told = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True
    ).stdout
    assert told.startswith("told: ")
    assert told.splitlines()[-1] == "[1]"
    assert not list(tmp_path.rglob("*.part"))
