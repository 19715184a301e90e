"""Checking what comes in: every reply, and the tensors in a request, before anything is computed from it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from . import __version__
from .curvature import CurvatureError, LayerCurvature
from .messages import CURVATURE, DIVERGED, EXTRA, METRICS, NUM_EXAMPLES, PAYLOAD, VERSION
from .wire import decode

_LARGEST_WHOLE = 2**53
"""Up to here a float64 tells whole numbers apart."""
_LEAST_WEIGHT = 1e-12
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What torch can compute with: of the types of 8 bits it cannot even tell whether they are finite."""
_WIDE = 1e30
"""What float32, bfloat16 and float64 reach, and float16 does not."""
_HEADROOM = 16.0
_MAX_QUOTE = 50
"""Longest part of a stranger's text that an error message repeats."""


class ReplyError(ValueError):
    """A reply that cannot be used, and why."""


@dataclass(frozen=True, eq=False)
class Update:
    """A checked reply: θᵢ by parameter name, curvature of some layers, nᵢ or 1 as its weight, more tensors."""

    state: dict[str, Tensor]
    layers: list[LayerCurvature]
    weight: float
    extra: dict[str, Tensor] = field(default_factory=dict, kw_only=True)


def read_update(reply: Message, theta: Mapping[str, Tensor], *, weighted_by: str = NUM_EXAMPLES) -> Update:
    """Check a training reply, all but its curvature, against the model θ that was sent out.

    Raises:
        ReplyError: naming what is wrong.
    """
    metrics = read_metrics(reply, weighted_by)
    if metrics.get(DIVERGED):
        raise ReplyError("its training diverged, it says: not finite, or a loss that rose a hundredfold")
    weight = metrics[weighted_by]
    assert isinstance(weight, int | float)
    return Update(_read_state(reply.content, theta), [], float(weight))


def read_metrics(reply: Message, weighted_by: str = NUM_EXAMPLES) -> MetricRecord:
    """The one MetricRecord of a reply, with a number by which to weight it.

    Raises:
        ReplyError: naming what is wrong.
    """
    if reply.has_error():
        raise ReplyError(f"it is an error: {reply.error.reason}")
    records = list(reply.content.metric_records.values())
    if len(records) != 1:
        raise ReplyError(f"it holds {len(records)} MetricRecords, not 1")
    weight = records[0].get(weighted_by)
    if not isinstance(weight, int | float) or not _LEAST_WEIGHT <= weight <= _LARGEST_WHOLE:
        raise ReplyError(f"{weighted_by!r} is {weight!r:.{_MAX_QUOTE}}, not a number > 0 (1e-12 to 2**53)")
    return records[0]


def read_tensors(
    content: RecordDict, shapes: Mapping[str, Sequence[int]] | None = None, *, record: str = EXTRA
) -> dict[str, Tensor]:
    """The tensors of a ``tensors_record``, finite; if ``shapes`` is given, exactly those, and of no wild values.

    Raises:
        ReplyError: naming what is wrong.
    """
    payload = content.config_records.get(record, ConfigRecord()).get(PAYLOAD)
    if not isinstance(payload, bytes):
        raise ReplyError(f"it holds no {record!r} tensors")
    try:
        tensors = load(payload)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ReplyError(f"its {record!r} tensors cannot be read: {error}") from error
    if shapes is not None and set(tensors) != set(shapes):
        odd = sorted(set(tensors) ^ set(shapes))
        raise ReplyError(f"its {record!r} tensors are not those asked for; missing or extra: {', '.join(odd[:5])}")
    for key, tensor in tensors.items():
        if shapes is not None and list(tensor.shape) != list(shapes[key]):
            raise ReplyError(f"its {record!r} tensor {key!r} is {list(tensor.shape)}, not {list(shapes[key])}")
        if not (tensor.dtype in _FLOATS and torch.isfinite(tensor).all()):
            raise ReplyError(f"its {record!r} tensor {key!r} is not finite floating-point numbers")
        # As of a model's arrays: with one such number the sum of all clients' is of no use any more.
        _, largest = _range(tensor.dtype)
        if shapes is not None and tensor.numel() and float(tensor.abs().max()) > largest:
            raise ReplyError(f"its {record!r} tensor {key!r} has a value beyond {largest:.3g}")
    return tensors


def read_curvature(
    reply: Message,
    theta: Mapping[str, Tensor],
    *,
    damping_bounds: tuple[float, float] = (0.0, math.inf),
    max_factor_side: int = 8192,
    max_payload_bytes: int = 1 << 30,
    device: torch.device | None = None,
) -> list[LayerCurvature]:
    """Check the curvature in a reply; there may be none. ``device``: where to compute for that.

    Raises:
        ReplyError: naming what is wrong.
    """
    record = reply.content.config_records.get(CURVATURE, ConfigRecord())
    if PAYLOAD not in record:
        return []
    version = record.get(VERSION, __version__)
    if not isinstance(version, str) or version.split(".")[:2] != __version__.split(".")[:2]:
        raise ReplyError(
            f"its curvature is made by fedpm-flwr {version!r:.{_MAX_QUOTE}}; the server has {__version__}: "
            "install the same version on both"
        )
    payload, shapes = record[PAYLOAD], {key: tuple(value.shape) for key, value in theta.items()}
    if not isinstance(payload, bytes):
        raise ReplyError(f"its curvature is {type(payload).__name__}, not bytes")
    try:
        layers = decode(payload, shapes, max_payload_bytes, max_factor_side)
    except ValueError as error:
        raise ReplyError(f"its curvature: {error}") from error
    for layer in layers:
        _check_layer(layer, damping_bounds, device)
    return layers


def with_common_metrics(contents: Sequence[RecordDict]) -> list[RecordDict]:
    """Replies with the metrics that all of them have, as numbers or as lists of equal length, and no others.

    Each must hold one MetricRecord. Flower's aggregation needs this, and one name for them all, and stops the run
    without it.
    """
    if not contents:
        return []
    forms = [
        {key: len(value) if isinstance(value, list) else None for key, value in record.items()}
        for content in contents
        for record in content.metric_records.values()
    ]
    names = {name for content in contents for name in content.metric_records}
    common = [key for key, form in forms[0].items() if all(key in other and other[key] == form for other in forms)]
    kept = []
    for content in contents:
        ((own, record),) = content.metric_records.items()
        others = {name: value for name, value in content.items() if name != own}
        name = own if len(names) == 1 else METRICS
        kept.append(RecordDict({**others, name: MetricRecord({key: record[key] for key in common})}))
    return kept


def _read_state(content: RecordDict, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    records = list(content.array_records.values())
    if len(records) != 1:
        raise ReplyError(f"it holds {len(records)} ArrayRecords, not 1")
    (record,) = records
    if set(record) != set(theta):
        odd = sorted(set(record) ^ set(theta))
        raise ReplyError(f"its arrays are not those of the model; missing or extra: {', '.join(odd[:5])}")
    state = {}
    for key, old in theta.items():
        try:
            new = torch.from_numpy(record[key].numpy())
        except Exception as error:  # bytes from outside: whatever is wrong with them, the reply is unusable
            raise ReplyError(f"array {key!r} cannot be read: {error}") from error
        if new.shape != old.shape or _sort(new) != _sort(old) or new.is_complex():
            raise ReplyError(f"array {key!r} is {new.dtype} {list(new.shape)}, not {old.dtype} {list(old.shape)}")
        state[key] = new.to(old.dtype)
        if new.dtype == old.dtype and _is_within(new) and _is_within(old):
            continue
        # What is as it was sent is no matter: masks are full of infinities.
        differs = state[key] != old
        changed = new[differs].to(torch.float64)
        if not torch.isfinite(changed).all():
            raise ReplyError(f"array {key!r} is not finite")
        if not torch.isfinite(old[differs]).all():
            raise ReplyError(f"array {key!r} has changed where the model's is not finite")
        low, high = _range(old.dtype)
        if changed.numel() and not (low <= float(changed.min()) and float(changed.max()) <= high):
            raise ReplyError(f"array {key!r} has a value beyond {low:.3g} or {high:.3g}")
    return state


def _is_within(array: Tensor) -> bool:
    """Whether all of it is floating point, of values to compute with, by one pass over it; NaN is not."""
    if not (array.is_floating_point() and array.numel()):
        return False
    least, largest = (float(value) for value in torch.aminmax(array))
    low, high = _range(array.dtype)
    return low <= least and largest <= high


def _sort(array: Tensor) -> tuple[bool, bool, bool]:
    """Floating point, complex, bool, or whole numbers: within a sort, widths may differ."""
    return array.is_floating_point(), array.is_complex(), array.dtype == torch.bool


def _range(dtype: torch.dtype) -> tuple[float, float]:
    """The values that mixing can still compute with, in float64 and then in this dtype."""
    if dtype == torch.bool:
        return 0.0, 1.0
    if dtype.is_floating_point:
        largest = torch.finfo(dtype).max
        largest = largest**0.5 if largest > _WIDE else largest / _HEADROOM
        return -largest, largest
    limits = torch.iinfo(dtype)
    return float(max(limits.min, -_LARGEST_WHOLE)), float(min(limits.max, _LARGEST_WHOLE))


def _check_layer(
    layer: LayerCurvature, damping_bounds: tuple[float, float], device: torch.device | None = None
) -> None:
    """One client's indefinite P could make the sum singular, or nearly so, for everyone."""
    name, (low, high) = f"layer {layer.block.name!r:.{_MAX_QUOTE}}", damping_bounds
    if not low <= layer.damping <= high:
        raise ReplyError(f"its curvature: {name}: damping {layer.damping} is not in [{low}, {high}]")
    try:
        layer.curvature.to(torch.float64, device).damped(layer.damping).check_positive_definite()
    except (CurvatureError, RuntimeError, MemoryError) as error:  # the last two: no memory for it
        raise ReplyError(f"its curvature: {name}: {error}") from error
