"""What became of each reply and each round, as lines of JSON for whoever operates a run."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .report import RunReport

_FIELD = "fedpm_event"


def event(name: str, **facts: Any) -> dict[str, dict[str, Any]]:
    """The ``extra`` of a record of Python's logging that an event file is to have, beside its text."""
    return {_FIELD: {"event": name, **facts}}


@contextmanager
def events_to(path: Path) -> Iterator[None]:
    """Add a line to a file for each event of the logger ``flwr``, of whatever level, while this goes on.

    A line is a JSON object with ``time`` (UTC), ``level``, ``event`` and the event's own facts:

    - ``reply``: round, node, partition (null: unknown), bytes (as sent), seconds (from request to receipt)
    - ``waiting``: round, node, partition, seconds
    - ``left-out``: round, node, partition, reason; ``silent``: round, nodes, reason
    - ``failed-round``: reason
    - ``checkpoint``: round, seconds; ``no-checkpoint``: round, reason
    """
    logger, handler = logging.getLogger("flwr"), _Lines(path)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Lines(logging.Handler):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path, self._is_told = path, False

    def emit(self, record: logging.LogRecord) -> None:
        if not hasattr(record, _FIELD):
            return
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": time, "level": record.levelname, **getattr(record, _FIELD)})
        try:
            _add(self._path, line.encode() + b"\n")
        except OSError as error:  # these lines are lost, the run is not; told once
            if not self._is_told:
                self._is_told = True
                RunReport.say(f"events could not be written, the run goes on: {error}")


def _add(path: Path, line: bytes) -> None:
    """To the end of a file, all of it or nothing: half a line would spoil the next one too.

    Raises:
        OSError: as where the disk is full.
    """
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            while line:  # a disk with little space left takes a part
                line = line[file.write(line) :]
        except OSError:
            with suppress(OSError):  # what is no regular file
                file.truncate(before)
            raise
