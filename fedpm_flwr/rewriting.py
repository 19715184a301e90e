"""Messages like others, with something in them changed; the rest is shared with them, not copied."""

import copy
from collections.abc import Mapping, Sequence

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from . import messages

_OURS = (messages.CURVATURE, messages.EXTRA)
"""Names of the ConfigRecords that hold what a strategy has asked for."""
_MOST_BYTES = 1 << 20


def with_content(message: Message, content: RecordDict) -> Message:
    """The message with another content."""
    changed = copy.copy(message)
    changed.content = content
    return changed


def with_extra(
    request: Message,
    extra: Mapping[str, Tensor] | ConfigRecord,
    config: Mapping[str, str | int | float] | None = None,
) -> Message:
    """A request like this one with further tensors, and with further entries in its config.

    Many requests may share one record of tensors, a ``messages.tensors_record``, as they share θ's.
    """
    records = {**request.content}
    ((name, old),) = request.content.config_records.items()
    records[name] = ConfigRecord({**old, **(config or {})})
    if extra:
        records[messages.EXTRA] = extra if isinstance(extra, ConfigRecord) else messages.tensors_record(extra)
    return Message(
        RecordDict(records),
        dst_node_id=request.metadata.dst_node_id,
        message_type=request.metadata.message_type,
        ttl=request.metadata.ttl,
        group_id=request.metadata.group_id,
    )


def without_arrays(content: RecordDict) -> RecordDict:
    """Metrics and the user's own ConfigRecords, under their names: what a function for metrics may look at.

    These are kept of all replies until the round ends; where a reply's own records have more than 1 MB, they
    are left out.
    """
    own = {name: record for name, record in content.config_records.items() if name not in _OURS}
    is_small = messages.count_bytes(RecordDict({**own})) <= _MOST_BYTES
    return RecordDict({**content.metric_records, **(own if is_small else {})})


def canonical(reply: Message, state: dict[str, Tensor]) -> RecordDict:
    """A reply's content as a stock strategy expects it, ``state`` as the model."""
    return RecordDict({messages.ARRAYS: ArrayRecord(state), **without_arrays(reply.content)})


def weighing_alike(replies: Sequence[Message], weighted_by_key: str) -> list[Message]:
    """``canonical`` replies, each with 1 for its number of examples."""
    changed = []
    for reply in replies:
        ((name, metrics),) = reply.content.metric_records.items()
        alike = MetricRecord({**metrics, weighted_by_key: 1})
        changed.append(with_content(reply, RecordDict({**reply.content, name: alike})))
    return changed
