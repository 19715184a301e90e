"""A run's state on the server's disk, so that it can be taken up again where it broke off.

One file a checkpoint, ``round-12.safetensors``: the tensors, and beside them a JSON document with the round, what
the strategy remembers, the history of metrics and whatever else the caller wants back. It appears whole or not at
all, and a changed bit is found (``durable``).
"""

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import Result
from torch import Tensor

from .durable import SUFFIX, DamagedFileError, read_tensors, write_tensors
from .report import PREFIX

_KIND = {"format": "fedpm-flwr checkpoint", "version": "2"}
_DOCUMENT, _NAME = "document", "round-"
_HISTORY = ("train_metrics_clientapp", "evaluate_metrics_clientapp", "evaluate_metrics_serverapp")
_log = logging.getLogger("flwr")


@dataclass(frozen=True)
class Checkpoint:
    """All that the rounds after this one depend on, beside the data and the clients' own states."""

    server_round: int
    """The last round that is in it, from 1."""
    arrays: ArrayRecord
    """θ."""
    strategy: str
    """The name of the strategy's class."""
    memory: dict[str, Any]
    """What the strategy remembers (``Guarded.remembered``); of another, its attributes and the run's names."""
    exchanges: int = 0
    """Of which the seed of client sampling is a function (``PartitionOrderedGrid``)."""
    history: Result = field(default_factory=Result)
    """The metrics of all rounds so far."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the run, by name."""


class Checkpoints:
    """The newest checkpoints of a run, in a folder of their own.

    Args:
        folder: made if it is not there.
        keep: how many; when there is one more, the oldest is removed.

    Raises:
        OSError: the folder cannot be made or written to.
        ValueError: naming the argument and what is allowed.
    """

    def __init__(self, folder: Path, keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"keep must be >= 1, not {keep}")
        self.folder, self._keep = folder, keep
        folder.mkdir(parents=True, exist_ok=True)

    def rounds(self) -> list[int]:
        """The rounds that there is a checkpoint of, in order."""
        names = [
            path.name.removeprefix(_NAME).removesuffix(SUFFIX) for path in self.folder.glob(f"{_NAME}*{SUFFIX}")
        ]
        return sorted(int(name) for name in names if name.isdecimal())

    def write(self, checkpoint: Checkpoint) -> None:
        """Write one, then remove those before it that are too many, and those after it.

        Raises:
            OSError: it cannot be written; those before it are as they were.
            TypeError: the strategy remembers what cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        parts = {
            "round": checkpoint.server_round,
            "strategy": checkpoint.strategy,
            "exchanges": checkpoint.exchanges,
            "settings": checkpoint.settings,
            "arrays": checkpoint.arrays,
            "memory": checkpoint.memory,
            "history": {name: getattr(checkpoint.history, name) for name in _HISTORY},
        }
        document = json.dumps({name: _encode(part, name, tensors) for name, part in parts.items()})
        write_tensors(self._path(checkpoint.server_round), tensors, {**_KIND, _DOCUMENT: document})
        # Those after it are of a past that could not be read, or the run would not have been taken up before them.
        rounds = self.rounds()
        kept = [number for number in rounds if number <= checkpoint.server_round][-self._keep :]
        for old in set(rounds).difference(kept):
            self._path(old).unlink(missing_ok=True)

    def read(self, server_round: int) -> Checkpoint:
        """The checkpoint of a round.

        Raises:
            OSError: it cannot be read.
            DamagedFileError: it is not as it was written, or is of another version.
        """
        path = self._path(server_round)
        tensors, metadata = read_tensors(path)
        document = metadata.pop(_DOCUMENT, "")
        if metadata != _KIND:
            found = json.dumps(metadata, sort_keys=True)  # safetensors returns it in any order
            raise DamagedFileError(f"{path}: it says {found}, not {json.dumps(_KIND)}")
        parts = {name: _decode(part, tensors) for name, part in json.loads(document).items()}
        return Checkpoint(
            server_round=parts["round"],
            arrays=parts["arrays"],
            strategy=parts["strategy"],
            memory=parts["memory"],
            exchanges=parts["exchanges"],
            history=Result(arrays=parts["arrays"], **parts["history"]),
            settings=parts["settings"],
        )

    def newest(self) -> Checkpoint:
        """The newest that can be read; the log names those after it that cannot.

        Raises:
            FileNotFoundError: there is none.
        """
        for number in reversed(self.rounds()):
            try:
                return self.read(number)
            except (OSError, DamagedFileError) as error:
                _log.warning("%sa checkpoint cannot be used, the one before it is: %s", PREFIX, error)
        raise FileNotFoundError(f"{self.folder} holds no checkpoint that can be read ({_NAME}NUMBER{SUFFIX})")

    def _path(self, server_round: int) -> Path:
        return self.folder / f"{_NAME}{server_round}{SUFFIX}"


# In the document null, true, false, text, whole and finite numbers stand for themselves, and everything else is
# an object of one entry, whose name says what it is.


def _encode(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON; tensors and bytes go to ``tensors``.

    Raises:
        TypeError: naming the place of what is neither.
    """
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, float):
        return {"float": repr(value)}
    if isinstance(value, Tensor):
        return {"tensor": _stored(value, place, tensors)}
    if isinstance(value, np.ndarray | np.generic):  # numpy makes the latter of arrays without dimensions
        return {"array": _stored(torch.from_numpy(np.array(value)), place, tensors)}
    if isinstance(value, bytes):
        return {"bytes": _stored(torch.from_numpy(np.frombuffer(value, np.uint8).copy()), place, tensors)}
    for name, (kind, to_parts, _) in _RECORDS.items():
        if isinstance(value, kind):
            return {name: _encode(to_parts(value), place, tensors)}
    if isinstance(value, list | tuple):
        items = [_encode(item, f"{place}/{index}", tensors) for index, item in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": items}
    if isinstance(value, Mapping) and all(isinstance(key, str | int) for key in value):
        return {"dict": [[key, _encode(item, f"{place}/{key}", tensors)] for key, item in value.items()]}
    raise TypeError(f"{place}: a {type(value).__name__} cannot be written into a checkpoint")


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What was encoded."""
    if not isinstance(value, dict):
        return value
    ((name, part),) = value.items()
    if name in _RECORDS:
        return _RECORDS[name][2](_decode(part, tensors))
    readers: dict[str, Callable[[], Any]] = {
        "float": lambda: float(part),
        "tensor": lambda: tensors[part],
        "array": lambda: tensors[part].numpy(),
        "bytes": lambda: tensors[part].numpy().tobytes(),
        "list": lambda: [_decode(item, tensors) for item in part],
        "tuple": lambda: tuple(_decode(item, tensors) for item in part),
        "dict": lambda: {key: _decode(item, tensors) for key, item in part},
    }
    return readers[name]()


_RECORDS: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "arrays": (
        ArrayRecord,
        lambda record: {key: array.numpy() for key, array in record.items()},
        lambda parts: ArrayRecord({key: Array(array) for key, array in parts.items()}),
    ),
    "config": (ConfigRecord, dict, ConfigRecord),
    "metrics": (MetricRecord, dict, MetricRecord),
}
"""Flower's records: of which type, to what can be encoded, and back."""


def _stored(tensor: Tensor, place: str, tensors: dict[str, Tensor]) -> str:
    name = f"{len(tensors)}/{place}"
    tensors[name] = tensor
    return name
