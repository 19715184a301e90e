"""What a client keeps between the rounds of a run, on its own disk."""

import json
import logging
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from .durable import SUFFIX, DamagedFileError, copy_if_there, flush, read_metadata, read_tensors, write_tensors

_KEPT_ROUNDS = 2
_COUNTED = "counted"
_KEPT_RUNS = 8
_MARK = ".fedpm-flwr-run"
"""An empty file in each run's folder."""
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_log = logging.getLogger("flwr")


def default_folder() -> Path:
    """Where states are kept if nothing else is said: in the system's temporary folder, a place for each user."""
    return Path(tempfile.gettempdir()) / f"fedpm-flwr-state-{os.getuid() if hasattr(os, 'getuid') else 'user'}"


class ClientState:
    """Named tensors of one client in one run, by round: ``folder/run/client/round.safetensors``.

    Files appear whole or not at all. The states of a client's last two rounds are kept, and those that the server
    still counts on, now or if the run is taken up again; of a folder, the eight runs that were used last, or as
    many as a new one still needs. To use a run is to use those that it was forked from too, as far as only they
    have a client's state. A file that cannot be read, has changed, or is of another version, is as if it were not
    there: the methods that keep state go on without it, and the log says so.

    Args:
        folder: of all runs; None: ``default_folder()``.
        run: a name that no other run has, which the server's requests tell.
        client: a name that no other client of the run has on this machine.
        checkpoints: the rounds that the run may be taken up after again, as if later ones had never been.
        forked_from: the run whose checkpoint this one began at, and after which round; then the run that
            that one has its beginning from, and so on. Their states of until then are this client's too.

    Raises:
        ValueError: a name has other characters than letters, digits, - and _, or more than 64.
    """

    def __init__(
        self,
        folder: Path | None,
        run: str,
        client: str,
        *,
        checkpoints: Iterable[int] = (),
        forked_from: Iterable[tuple[str, int]] = (),
    ) -> None:
        origins = list(forked_from)
        for what, name in (("run", run), ("client", client), *(("run", origin) for origin, _ in origins)):
            if not _NAME.fullmatch(name):
                raise ValueError(f"{what} name {name!r:.80} is not allowed; allowed: 1 to 64 of A-Z a-z 0-9 _ -")
        self._is_default, self._root = folder is None, folder or default_folder()
        self._run = self._root / run
        self._folder = self._run / client
        self._origins = [(self._root / origin / client, number) for origin, number in origins]
        self._checkpoints = sorted(checkpoints)

    def save(self, number: int, tensors: Mapping[str, Tensor], counted: int | None = None) -> None:
        """Keep these tensors as the state after round ``number``, and of older ones what may still be asked for.

        ``counted``: the round whose state the server counted on before this one.

        Raises:
            OSError: the folder cannot be written to; or the default one is another user's, who has made it first.
        """
        if self._is_default:
            _make_private(self._root)
        if not self._run.exists():
            self._forget_old_runs(self._touch())
        self._run.mkdir(parents=True, exist_ok=True, mode=0o700)
        (self._run / _MARK).touch()
        self._touch()
        if not self._folder.exists():
            self._make_folder()
        told = "" if counted is None else str(counted)
        write_tensors(self._folder / f"{number}{SUFFIX}", tensors, {**_kind(number), _COUNTED: told})
        for old in self._files().keys() - self._needed(number, counted):
            (self._folder / f"{old}{SUFFIX}").unlink(missing_ok=True)

    def _needed(self, number: int, counted: int | None) -> set[int | None]:
        """The rounds, up to this one, whose states may still be asked for."""
        rounds = self.rounds()
        # Two: a client that is stopped in a round, and started in it again, begins at the state before.
        needed = {counted, *[old for old in rounds if old <= number][-_KEPT_ROUNDS:]}
        for checkpoint in self._checkpoints:
            # Taken up after it, the client would have been at its newest state of then. What the server counted on
            # then it has told with its next request: that is beside the state that this request led to.
            needed |= set([old for old in rounds if old <= checkpoint][-1:])
            if later := [old for old in rounds if old > checkpoint]:
                needed |= {later[0], self._counted(later[0])}
        return needed

    def load(self, number: int | None = None, *, before: int | None = None) -> dict[str, Tensor]:
        """The state after round ``number``, or the newest, of those ``before`` a round; empty: there is none."""
        files = self._files()
        if number is None:
            number = max((old for old in files if before is None or old < before), default=None)
            if number is None:
                return {}
        if number not in files:
            _log.warning(
                "client state of round %d is not in %s, the client goes on without it", number, self._folder
            )
            return {}
        path = files[number]
        try:
            tensors, metadata = read_tensors(path)
            metadata.pop(_COUNTED, None)
            expected = _kind(number)
            if metadata != expected:
                raise DamagedFileError(
                    f"it says {json.dumps(metadata, sort_keys=True)}, not {json.dumps(expected)}"
                )
        except (OSError, DamagedFileError) as error:
            _log.warning("client state %s cannot be used, the client goes on without it: %s", path, error)
            return {}
        return tensors

    def rounds(self) -> list[int]:
        """The rounds that there is a state of, in order."""
        return sorted(self._files())

    def _files(self) -> dict[int, Path]:
        """By round: the client's own; as long as it has none in this run, those of a run this was forked from."""
        if self._is_default and not _is_own(self._root):
            return {}
        for folder, last in [(self._folder, None), *self._origins]:
            if folder.exists():
                named = {path.name.removesuffix(SUFFIX): path for path in folder.glob(f"*{SUFFIX}")}
                files = {int(name): path for name, path in named.items() if name.isdecimal()}
                return {number: path for number, path in files.items() if last is None or number <= last}
        return {}

    def _make_folder(self) -> None:
        """With copies of what the client has from the run that this one was forked from, at once or not at all."""
        part = self._run / f"{self._folder.name}.part"
        shutil.rmtree(part, ignore_errors=True)  # of a copy that was broken off
        part.mkdir(mode=0o700)
        try:
            for path in self._files().values():
                copy_if_there(path, part / path.name)
            flush(part)
            os.rename(part, self._folder)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise

    def _counted(self, number: int) -> int | None:
        """What ``save`` was told beside the state of this round."""
        try:
            told = read_metadata(self._files()[number]).get(_COUNTED, "")
        except (OSError, DamagedFileError):
            return None
        return int(told) if told.isdecimal() else None

    def _touch(self) -> set[Path]:
        """This run is used, and so is one that it was forked from, as long as only that has a client's state."""
        now, clients, used = time.time_ns(), set[str](), set[Path]()
        for run in (self._run, *(folder.parent for folder, _ in self._origins)):
            with suppress(OSError):  # forgotten already, or another user's
                found = {path.name for path in run.iterdir() if _NAME.fullmatch(path.name)}
                if run == self._run or found - clients:
                    used.add(run)
                    os.utime(run, ns=(now, now))
                clients |= found
        return used

    def _forget_old_runs(self, used: set[Path]) -> None:
        # The folder may be anybody's, and hold anything: only what carries our mark is ours to delete.
        marked = {mark.parent for mark in self._root.glob(f"*/{_MARK}")}
        runs = sorted((run for run in marked if not run.is_symlink()), key=_last_used)
        surplus = max(len(runs) - _KEPT_RUNS + 1, 0)
        for old in [run for run in runs if run not in used][:surplus]:
            shutil.rmtree(old, ignore_errors=True)


def _kind(number: int) -> dict[str, str]:
    return {"format": "fedpm-flwr client state", "version": "1", "round": str(number)}


def _make_private(folder: Path) -> None:
    """In a place that all may write to, such as /tmp, a folder that is ours alone."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_own(folder):
        raise OSError(f"{folder} is not a folder of this user's own; state-folder names another")
    folder.chmod(0o700)


def _is_own(folder: Path) -> bool:
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and (not hasattr(os, "getuid") or found.st_uid == os.getuid())


def _last_used(run: Path) -> float:
    try:
        return run.stat().st_mtime
    except OSError:  # another client's process has just removed it
        return 0.0
