"""A model's many arrays as one array per dtype and, if asked for, uploads in fewer bits.

Every Array costs Flower objects and requests of its own, however small it is. ``PackedGrid`` on the server and the
mod ``packed_arrays`` on the client line up the arrays of each ArrayRecord, dtype by dtype, in one Array. They do
it where messages come and go: strategies, evaluation, training functions and results see ordinary ArrayRecords,
under any strategy.

    strategy.start(grid=PackedGrid(grid), ...)   # in the ServerApp
    app = ClientApp(mods=[packed_arrays])        # before other mods, which then see ordinary arrays too

By ``PackedGrid(grid, update="int8")``, or ``"bfloat16"``, training replies hold the change θᵢ − θ in so few bits
(``wire.change``) and are read as θ + change, so that strategies still get full weights. What rounding left out
the client keeps on its disk and adds to its next change (error feedback: Seide et al., Interspeech 2014;
Karimireddy et al., ICML 2019); but not where the request asks for clipped changes, as differential privacy does.
"""

import copy
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MessageType, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from flwr.common.constant import ErrorCode, SType
from flwr.serverapp import Grid
from torch import Tensor

from . import messages
from .config import UPDATES
from .grids import WrappedGrid
from .rewriting import with_content
from .wire.change import STORED, read_change, round_change

PACKED = "packed-arrays"
"""The ConfigRecord that says how the ArrayRecords of a message are packed."""
_LAYOUTS, _UPDATE = "layouts", "update"
_HINT = "the ClientApp needs mods=[fedpm_flwr.packing.packed_arrays]"
_KEY = "{} arrays, packed by fedpm-flwr: " + _HINT
"""The name of a packed Array. It is what a ClientApp without the mod will complain of."""
_KINDS = "biufc"
"""Of NumPy's dtypes: numbers."""
_FLOATS = (np.dtype("float16"), np.dtype("float32"), np.dtype("float64"))
"""What has changes that torch can compute with."""
_KEPT_BYTES = 1 << 30
"""Of requests that nobody has replied to, beside the newest."""
_MOST_ENTRIES = 20_000
"""Arrays of a message: without a limit, few bytes could stand for millions of empty ones."""
_CLIPPED = "clipping_norm"
"""In the config of a request by which Flower's differential privacy bounds the change."""
_MAX_QUOTE = 100
_log = logging.getLogger("flwr")


class PackingError(ValueError):
    """Packed arrays that cannot be read."""


class Entry(NamedTuple):
    """One array among those that are lined up; with an ``update`` that is not none, its change, in this unit."""

    key: str
    dtype: str
    shape: Sequence[int]
    update: str = "none"
    unit: float = 1.0


class PackedGrid(WrappedGrid):
    """Sends ArrayRecords packed, and unpacks those of the replies; one that cannot be read becomes an error.

    Args:
        grid: the Grid that Flower gives to the ServerApp.
        update: in what training replies say what has changed: ``bfloat16`` or ``int8``; ``none``: whole arrays.

    Raises:
        ValueError: naming the argument and what is allowed.
    """

    def __init__(self, grid: Grid, update: str = "none") -> None:
        super().__init__(grid)
        if update not in UPDATES:
            raise ValueError(f"unknown update {update!r}; allowed: {', '.join(UPDATES)}")
        self._update = update
        self._requests: dict[str, RecordDict] = {}  # by message ID, until they are replied to

    def outgoing(self, messages: Iterable[Message]) -> list[Message]:
        packed: dict[int, _Lined | None] = {}
        return [with_content(message, _pack(message.content, packed, self._update)) for message in messages]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        given = list(messages)
        ids = super().push_messages(given)
        self._remember(given)
        return ids

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        given = list(messages)
        replies = list(self.inner.send_and_receive(self.outgoing(given), timeout=timeout))
        self._remember(given)
        return self._received(replies)

    def _remember(self, messages: Iterable[Message]) -> None:
        """What changes are to be added to; Grids give messages their IDs while they send them."""
        if self._update == "none":
            return
        for message in messages:
            self._requests[message.metadata.message_id] = RecordDict({**message.content.array_records})
        # Who never replies must not keep old models in memory for ever.
        kept, size = set[int](), 0
        for key, content in reversed(list(self._requests.items())):
            new = [record for record in content.array_records.values() if id(record) not in kept]
            size += sum(record.count_bytes() for record in new)
            if kept and new and size > _KEPT_BYTES:
                del self._requests[key]
            kept |= {id(record) for record in content.array_records.values()}

    def incoming(self, reply: Message) -> Message:
        request = self._requests.pop(reply.metadata.reply_to_message_id, RecordDict())
        if reply.has_error() and _HINT in str(reply.error.reason):
            return _failed(reply, f"{_HINT}; {reply.error.reason}")
        if not (reply.has_content() and PACKED in reply.content.config_records):
            return reply
        try:
            return with_content(reply, _unpack(reply.content, request))
        except PackingError as error:
            return _failed(reply, f"its packed arrays cannot be read: {error}")


def packed_arrays(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """The mod of a ClientApp whose server has a ``PackedGrid``; with any other Grid it does nothing."""
    if PACKED not in message.content.config_records:
        return call_next(message, context)
    update = str(message.content.config_records[PACKED].get(_UPDATE, "none"))
    if update not in UPDATES:
        raise PackingError(f"unknown update {update!r:.{_MAX_QUOTE}}; allowed: {', '.join(UPDATES)}")
    request = with_content(message, _unpack(message.content, RecordDict()))
    records = request.content.array_records
    # Copies, since the ClientApp may change its own.
    before = RecordDict({name: ArrayRecord({**record}) for name, record in records.items()})
    reply = call_next(request, context)
    if not reply.has_content():
        return reply
    if update == "none" or message.metadata.message_type.split(".")[0] != MessageType.TRAIN:
        return with_content(reply, _pack(reply.content, {}))
    # What is added to a clipped change is no longer within the bound.
    clipped = any(_CLIPPED in config for config in request.content.config_records.values())
    kept = None if clipped else _Feedback(request, context)
    return with_content(reply, _pack_changes(reply.content, before, update, kept))


_Lined = tuple[ArrayRecord, list[Entry]]


def _pack(content: RecordDict, packed: dict[int, _Lined | None], update: str = "none") -> RecordDict:
    """The content with its ArrayRecords packed; ``packed`` has those that other messages share with it."""
    lined = {}
    for name, record in content.array_records.items():
        if id(record) not in packed:
            parts = [(_entry(key, array), array) for key, array in (_arrays(record) or {}).items()]
            packed[id(record)] = _line_up(parts) if parts else None
        lined[name] = packed[id(record)]
    return _with_lined(content, lined, update)


def _pack_changes(content: RecordDict, request: RecordDict, update: str, kept: "_Feedback | None") -> RecordDict:
    """The content with what has changed since the request in few bits; what they leave out is ``kept``."""
    left = kept.load() if kept else {}
    lined, rest = {}, dict(left)
    for name, record in content.array_records.items():
        before, parts = _like(request, name, set(record)), []
        for key, array in (_arrays(record) or {}).items():
            entry, part, left_out = _change(key, array, before.get(key), left.get(f"{name}/{key}"), update)
            parts.append((entry, part))
            rest.pop(f"{name}/{key}", None)
            if left_out is not None:
                rest[f"{name}/{key}"] = left_out
        lined[name] = _line_up(parts) if parts else None
    try:
        if kept and lined:
            kept.save(rest)
    except OSError as error:
        _log.warning("what rounding leaves out of a change could not be kept, and is lost: %s", error)
    return _with_lined(content, lined)


def _change(
    key: str, array: np.ndarray, before: np.ndarray | None, left: Tensor | None, update: str
) -> tuple[Entry, np.ndarray, Tensor | None]:
    """An array's rounded change and what that leaves out; or the array as it is, where it has no finite change."""
    entry = _entry(key, array)
    if before is None or (before.dtype, before.shape) != (array.dtype, array.shape):
        return entry, array, None
    if array.dtype not in _FLOATS or not array.size:
        return entry, array, None
    change = torch.from_numpy(array).double() - torch.from_numpy(before).double()
    # More than the change itself was left out of one that was far larger, as of training that had diverged.
    if left is not None and left.shape == change.shape and left.abs().max() <= change.abs().max():
        change = change + left
    rounded, unit = round_change(change, update)
    left_out = change - read_change(rounded, unit, update)
    if not torch.isfinite(left_out).all():  # as where training diverged
        return entry, array, None
    # Nothing may turn negative that is a variance, say.
    if (array >= 0).all() and (before + (change - left_out).numpy() < 0).any():
        return entry, array, None
    dtype = torch.promote_types(torch.from_numpy(array).dtype, torch.float32)
    return entry._replace(update=update, unit=unit), rounded.numpy(), left_out.to(dtype)


def _unpack(content: RecordDict, request: RecordDict) -> RecordDict:
    """The content with ordinary ArrayRecords; changes are added to the arrays of the request.

    Raises:
        PackingError: naming what is wrong. The bytes may come from a broken or hostile client.
    """
    records = {**content}
    try:
        layouts = json.loads(str(records.pop(PACKED)[_LAYOUTS]))
        for name, layout in layouts.items():
            if len(layout) > _MOST_ENTRIES:
                raise PackingError(f"{len(layout)} arrays, more than the {_MOST_ENTRIES} allowed")
            entries = [Entry(*entry) for entry in layout]
            changed = any(entry.update != "none" for entry in entries)
            before = _like(request, name, {entry.key for entry in entries}) if changed else {}
            records[name] = _spread_out(content.array_records[name], entries, before)
    except PackingError:
        raise
    except Exception as error:  # whatever is wrong with a stranger's bytes, they are no packed arrays
        raise PackingError(f"{type(error).__name__}: {error!s:.{_MAX_QUOTE}}") from error
    return RecordDict(records)


def _line_up(parts: Sequence[tuple[Entry, np.ndarray]]) -> _Lined | None:
    """One Array per dtype, in the order of the entries; None: there are other things than numbers."""
    by_dtype: dict[str, list[np.ndarray]] = {}
    for _, part in parts:
        by_dtype.setdefault(str(part.dtype), []).append(part.reshape(-1))
        if part.dtype.kind not in _KINDS:
            return None
    record = {_KEY.format(dtype): Array(np.concatenate(each, dtype=dtype)) for dtype, each in by_dtype.items()}
    return ArrayRecord(record), [entry for entry, _ in parts]


def _spread_out(record: ArrayRecord, entries: Sequence[Entry], before: Mapping[str, np.ndarray]) -> ArrayRecord:
    """The arrays again, each under its key.

    Raises:
        ValueError: the entries do not fit the record.
    """
    lines = {str(array.dtype): array for array in (_arrays(record) or {}).values()}
    used = dict.fromkeys(lines, 0)
    spread: dict[str, Array] = {}
    for entry in entries:
        stored = str(STORED[entry.update]).removeprefix("torch.") if entry.update != "none" else entry.dtype
        if stored not in lines or not all(type(n) is int and n >= 0 for n in entry.shape):
            raise ValueError(f"the entry {entry!r:.{_MAX_QUOTE}} does not fit")
        start, end = used[stored], used[stored] + math.prod(entry.shape)
        if end > len(lines[stored]):
            raise ValueError(f"there are no {end} numbers of dtype {stored}")
        part, used[stored] = lines[stored][start:end].reshape(entry.shape), end
        spread[entry.key] = Array(part if entry.update == "none" else _after(entry, part, before[entry.key]))
    if any(used[dtype] != len(line) for dtype, line in lines.items()):
        raise ValueError("there are more numbers than the entries have")
    return ArrayRecord(spread)


def _after(entry: Entry, stored: np.ndarray, before: np.ndarray) -> np.ndarray:
    """θ and its change."""
    if (str(before.dtype), list(before.shape)) != (entry.dtype, list(entry.shape)):
        raise ValueError(f"{entry.key!r} is {before.dtype} {list(before.shape)} in the request")
    change = read_change(torch.from_numpy(stored.copy()), float(entry.unit), entry.update)
    return np.asarray(before.astype(np.float64) + change.numpy(), before.dtype)  # of no axes, the sum is no array


def _like(content: RecordDict, name: str, keys: set[str]) -> dict[str, np.ndarray]:
    """The ArrayRecord of this name, or else one with these keys; empty: there is none."""
    records = content.array_records
    named = [records[name]] if name in records else []
    found = [record for record in (*named, *records.values()) if set(record) == keys]
    return (_arrays(found[0]) or {}) if found else {}


def _arrays(record: ArrayRecord) -> dict[str, np.ndarray] | None:
    """By key; None: some are not NumPy's, whose bytes only those who made them can read."""
    if any(array.stype != SType.NUMPY for array in record.values()):
        return None
    return {key: array.numpy() for key, array in record.items()}


def _entry(key: str, array: np.ndarray) -> Entry:
    return Entry(key, str(array.dtype), array.shape)


def _with_lined(content: RecordDict, lined: Mapping[str, _Lined | None], update: str = "none") -> RecordDict:
    records, layouts = {**content}, {}
    for name, found in lined.items():
        if found:
            records[name], layouts[name] = found
    if layouts:
        said = {_LAYOUTS: json.dumps(layouts, separators=(",", ":")), _UPDATE: update}
        records[PACKED] = ConfigRecord({**said})
    return RecordDict(records)


def _failed(message: Message, reason: str) -> Message:
    changed = copy.copy(message)
    changed.__dict__.update(_content=None, _error=Error(ErrorCode.MOD_FAILED_PRECONDITION, reason))
    return changed


class _Feedback:
    """What rounding has left out of a node's changes so far.

    The newest is kept, in place of the last; in a run that may be taken up again, where all nodes and the run
    have new IDs, by round, under the names that stay.
    """

    def __init__(self, request: Message, context: Context) -> None:
        run, client = str(context.run_id), f"node-{context.node_id}"
        self._number, self._before = 0, None
        if messages.asked(request, messages.CHECKPOINTS) is not None:
            if messages.PARTITION_ID in context.node_config:
                client = f"partition-{context.node_config[messages.PARTITION_ID]}"
            self._number = self._before = messages.server_round_of(request)
        self._state = messages.client_state(request, messages.state_folder(context), f"feedback-{client}", run)

    def load(self) -> dict[str, Tensor]:
        return self._state.load(before=self._before)

    def save(self, left_out: Mapping[str, Tensor]) -> None:
        self._state.save(self._number, left_out)
