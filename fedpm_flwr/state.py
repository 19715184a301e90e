"""What a client keeps between the rounds of a run, on its own disk."""

import json
import logging
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from .durable import SUFFIX, DamagedFileError, read_tensors, write_tensors

_KIND = {"format": "fedpm-flwr client state", "version": "1"}
_KEPT_ROUNDS = 2
"""The newest, and the one before it, which the server still counts on if the newest reply was lost."""
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

    Files appear whole or not at all. The last two rounds of a client are kept, and any that the server
    still counts on or may go back to; of a folder, the eight runs that were used last. A file that cannot be
    read, has changed, or is of another version, is as if it were not there: the methods that keep state go on
    without it, and the log says so.

    Args:
        folder: of all runs; None: ``default_folder()``.
        run: a name that no other run has, which the server's requests tell.
        client: a name that no other client of the run has on this machine.

    Raises:
        ValueError: a name has other characters than letters, digits, - and _, or more than 64.
    """

    def __init__(self, folder: Path | None, run: str, client: str) -> None:
        for what, name in (("run", run), ("client", client)):
            if not _NAME.fullmatch(name):
                raise ValueError(f"{what} name {name!r:.80} is not allowed; allowed: 1 to 64 of A-Z a-z 0-9 _ -")
        self._is_default, self._root = folder is None, folder or default_folder()
        self._runs = self._root / run
        self._folder = self._runs / client

    def save(
        self, number: int, tensors: Mapping[str, Tensor], counted: int | None = None, resumable: int | None = None
    ) -> None:
        """Keep these tensors as the state after round ``number``, and of older ones what may still be asked for.

        ``counted``: a round whose state the server still counts on. ``resumable``: the oldest round that the
        run may be taken up after again (``checkpoint``), as if later ones had never been.

        Raises:
            OSError: the folder cannot be written to; or the default one is another user's, who has made it first.
        """
        if self._is_default:
            _make_private(self._root)
        if not self._runs.exists():
            self._forget_old_runs()
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (self._runs / _MARK).touch()
        os.utime(self._runs)  # used just now: not the first to be forgotten
        write_tensors(self._path(number), tensors, {**_KIND, "round": str(number)})
        rounds = self.rounds()
        needed = {*rounds[-_KEPT_ROUNDS:], counted}
        if resumable is not None:
            before = [old for old in rounds if old <= resumable]
            needed |= {*before[-_KEPT_ROUNDS:], *(old for old in rounds if old > resumable)}
        for old in rounds:
            if old not in needed:
                self._path(old).unlink(missing_ok=True)

    def load(self, number: int | None = None, *, before: int | None = None) -> dict[str, Tensor]:
        """The state after round ``number``, or the newest, of those ``before`` a round; empty: there is none."""
        kept = [old for old in self.rounds() if before is None or old < before]
        if number is None and kept:
            number = kept[-1]
        if number not in kept:
            return {}
        assert number is not None
        path = self._path(number)
        try:
            tensors, metadata = read_tensors(path)
            expected = {**_KIND, "round": str(number)}
            if metadata != expected:
                raise DamagedFileError(f"it says {json.dumps(metadata)}, not {json.dumps(expected)}")
        except (OSError, DamagedFileError) as error:
            _log.warning("client state %s cannot be used, the client goes on without it: %s", path, error)
            return {}
        return tensors

    def rounds(self) -> list[int]:
        """The rounds that there is a state of, in order."""
        if self._is_default and not _is_own(self._root):
            return []
        names = [path.name.removesuffix(SUFFIX) for path in self._folder.glob(f"*{SUFFIX}")]
        return sorted(int(name) for name in names if name.isdecimal())

    def _path(self, number: int) -> Path:
        return self._folder / f"{number}{SUFFIX}"

    def _forget_old_runs(self) -> None:
        # The folder may be anybody's, and hold anything: only what carries our mark is ours to delete.
        marked = [mark.parent for mark in self._root.glob(f"*/{_MARK}")]
        runs = sorted((run for run in marked if not run.is_symlink()), key=_last_used)
        for old in runs[: max(len(runs) - _KEPT_RUNS + 1, 0)]:
            shutil.rmtree(old, ignore_errors=True)


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
