"""The names in Flower's records, said once; reading requests, building replies.

A training reply holds ``arrays`` (one ArrayRecord: the client's full model θᵢ under the keys it
got), ``metrics`` (one MetricRecord with ``num-examples``) and, if the server asked for it,
``curvature`` (a ConfigRecord with one bytes value). Stock strategies ignore the last, so the same
ClientApp is LocalNewton under FedAvg and FedPM under FedPM.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from safetensors.torch import save
from torch import Tensor, nn

from . import __version__
from .curvature import LayerCurvature
from .privacy import refuse_differential_privacy
from .state import ClientState
from .wire import check_names, encode, in_names, own_copies

ARRAYS = "arrays"
"""The record of the model, in requests and replies."""
CONFIG = "config"
"""The record of settings in a request."""
METRICS = "metrics"
"""The record of numbers in a reply."""
CURVATURE = "curvature"
"""The record of curvature in a training reply."""
EXTRA = "extra"
"""Further tensors of a method, as control variates, beside the model: in requests and replies."""

NUM_EXAMPLES = "num-examples"
"""A metric: nᵢ, how many examples the client trained or evaluated on."""
SERVER_ROUND = "server-round"
"""In the request's config: the round, from 1."""
CURVATURE_CODEC = "curvature-codec"
"""In the request's config: the codec that curvature shall travel in; absent: send none."""
EXPERIMENT = "experiment"
"""In the request's config: a name that no other run has, by which clients keep their state."""
CHECKPOINTS = "checkpoints"
"""In the request's config: the rounds that the run may be taken up after again, or ``none`` yet; absent: never."""
FORKED_FROM = "forked-from"
"""In the request's config, as ``name/round name/round``: the run whose checkpoint this one began at, the run that
that one has its beginning from, and so on; absent: it began at round 1."""
FORM = "form"
"""In the request's config: what the model's inputs look like, and how many classes there are."""
PHASE = "phase"
"""In the request's config, where a round has several exchanges: which one; absent: ``TRAIN``."""
TRAIN = "train"
"""The phase of local training."""
GRADIENT = "gradient"
"""The phase in which clients are asked for ∇fᵢ(θ) alone, and the name of that tensor."""
PAYLOAD = "payload"
"""In the records of curvature and of further tensors: their bytes."""
VERSION = "version"
"""Beside the payload: the version of this library that made it."""
DIVERGED = "diverged"
"""A metric: not 0 where the client's training diverged (``training.FitResult``)."""

PARTITION_ID = "partition-id"
"""In a node's configuration: its partition, from 0."""
NUM_PARTITIONS = "num-partitions"
"""In a node's configuration: how many partitions there are."""
STATE_FOLDER = "state-folder"
"""In a node's configuration, or else in the run's: an absolute folder."""
PARTITION_QUERY = "query.partition"
"""The type of the messages that ask a node for its partition."""
PARTITION_ACTION = "partition"
"""The name under which a ClientApp answers them: ``@app.query(PARTITION_ACTION)``."""


@runtime_checkable
class Preconditioned(Protocol):
    """An optimizer that says by what it preconditioned.

    If it has a method ``model_arrays``, as those of ``fedpm_flwr.optim``, the server's names are checked by it
    (``wire.check_names``); else its layers' names have to be those of the model that is exchanged.
    """

    def preconditioners(self) -> list[LayerCurvature]:
        """P of each layer that has one, with the damping it was stepped by."""


def asked_codec(message: Message) -> str | None:
    """The codec in which the server wants curvature, or None if it wants none."""
    return asked(message, CURVATURE_CODEC)


def server_round_of(request: Message) -> int:
    """The round, from 1, that a request belongs to.

    Raises:
        ValueError: the request does not name it, as every strategy derived from FedAvg does.
    """
    for config in request.content.config_records.values():
        number = config.get(SERVER_ROUND)
        if isinstance(number, int):
            return number
    raise ValueError(f"the request names no {SERVER_ROUND!r} as a whole number")


def client_state(request: Message, folder: Path | None, client: str, run: str = "unnamed") -> ClientState:
    """What a client keeps in the run that a request belongs to; ``run``: where the request does not name it.

    Raises:
        ValueError: a name is not allowed.
    """
    forked = [word.rpartition("/") for word in (asked(request, FORKED_FROM) or "").split()]
    return ClientState(
        folder,
        asked(request, EXPERIMENT) or run,
        client,
        checkpoints=[int(word) for word in (asked(request, CHECKPOINTS) or "").split() if word != "none"],
        forked_from=[(name, int(number)) for name, _, number in forked],
    )


def named(
    config: ConfigRecord,
    experiment: str,
    forked_from: Iterable[tuple[str, int]],
    checkpoints: Iterable[int] | None,
) -> ConfigRecord:
    """A request's config with the names that ``client_state`` reads."""
    told = ConfigRecord({**config, EXPERIMENT: experiment})
    if checkpoints is not None:
        # Never empty: Flower cannot count the bytes of empty text.
        told[CHECKPOINTS] = " ".join(map(str, checkpoints)) or "none"
    if origins := " ".join(f"{run}/{number}" for run, number in forked_from):
        told[FORKED_FROM] = origins
    return told


def asked(request: Message, key: str) -> str | None:
    """What the request's config says under this key, as text; None: nothing."""
    for config in request.content.config_records.values():  # under whatever name the strategy sends it
        if key in config:
            return str(config[key])
    return None


def tensors_record(tensors: Mapping[str, Tensor]) -> ConfigRecord:
    """Named tensors as one bytes value: stock strategies and clients pass over it."""
    return ConfigRecord({PAYLOAD: save(own_copies(tensors))})


def curvature_record(optimizer: Preconditioned, request: Message) -> ConfigRecord:
    """What the optimizer preconditioned by, as the request wants it; empty if it wants none.

    The layers have the names of the request's arrays (``wire.in_names``); one that is not among them, as of
    a part of the model that stays with the client, is left out.

    Raises:
        TypeError: the optimizer does not say by what it preconditioned, as those of ``fedpm_flwr.optim`` do.
        ValueError: the server asks for a codec that this version does not know; or the ClientApp has one of
            Flower's mods for differential privacy; or the arrays are not those of the optimizer's model, or
            need not be.
    """
    codec = asked_codec(request)
    if codec is None:
        return ConfigRecord()
    refuse_differential_privacy()
    if not isinstance(optimizer, Preconditioned):
        raise TypeError(
            f"{type(optimizer).__name__} has no curvature to send: take an optimizer of fedpm_flwr.optim "
            "itself, not what wraps it; or leave the record out, and the client is averaged"
        )
    arrays = _as_meta(request)
    own = optimizer.model_arrays() if hasattr(optimizer, "model_arrays") else {}
    layers = in_names(optimizer.preconditioners(), arrays, own)
    if layers and own:
        check_names(arrays, own)
    payload = encode(layers, codec, arrays)
    return ConfigRecord({PAYLOAD: payload, VERSION: __version__})


def _as_meta(request: Message) -> dict[str, Tensor]:
    """Shapes and dtypes of the model in a request, without its numbers."""
    return {
        key: torch.empty(array.shape, dtype=getattr(torch, array.dtype, torch.float32), device="meta")
        for record in request.content.array_records.values()
        for key, array in record.items()
    }


def train_reply(
    request: Message,
    model: nn.Module,
    metrics: Mapping[str, int | float],
    optimizer: object = None,
) -> Message:
    """The reply to a training request; ``metrics`` must hold ``num-examples``.

    Curvature goes along if it is asked for, the optimizer has it, and training did not diverge.
    """
    content = RecordDict({ARRAYS: ArrayRecord(model.state_dict()), METRICS: MetricRecord({**metrics})})
    if asked_codec(request) is not None and isinstance(optimizer, Preconditioned) and not metrics.get(DIVERGED):
        content[CURVATURE] = curvature_record(optimizer, request)
    return Message(content, reply_to=request)


def metrics_reply(request: Message, metrics: Mapping[str, int | float]) -> Message:
    """A reply of metrics alone, as to an evaluation request."""
    return Message(RecordDict({METRICS: MetricRecord({**metrics})}), reply_to=request)


def partition_of(context: Context) -> tuple[int, int]:
    """The node's partition and the number of partitions, from its node config.

    Raises:
        ValueError: the node config does not name them, or they do not fit.
    """
    partition, count = context.node_config.get(PARTITION_ID), context.node_config.get(NUM_PARTITIONS)
    if not (isinstance(partition, int) and isinstance(count, int) and 0 <= partition < count):
        raise ValueError(
            f"the node config must name {PARTITION_ID} and {NUM_PARTITIONS} as whole numbers, the first "
            f"from 0 and below the second; got {dict(context.node_config)}"
        )
    return partition, count


def state_folder(context: Context) -> Path | None:
    """Where this node keeps what lasts from round to round: as its site says, or the run; None: the default.

    Raises:
        ValueError: it is not an absolute path.
    """
    named = str(context.node_config.get(STATE_FOLDER) or context.run_config.get(STATE_FOLDER) or "")
    if named and not Path(named).is_absolute():
        raise ValueError(f"{STATE_FOLDER}={named!r:.200} is not an absolute path")
    return Path(named) if named else None


def partition_reply(request: Message, context: Context) -> Message:
    """The answer to a ``PARTITION_QUERY``: which partition this node holds."""
    return metrics_reply(request, {PARTITION_ID: partition_of(context)[0]})


def count_bytes(content: RecordDict) -> int:
    """Bytes of all records, as Flower itself counts them."""
    return sum(_count_bytes(record) for record in content.values())


def _count_bytes(record: ArrayRecord | MetricRecord | ConfigRecord) -> int:
    """Flower cannot count an empty list: it looks at its first element."""
    if isinstance(record, ConfigRecord):
        record = ConfigRecord({key: value for key, value in record.items() if value != []})
    elif isinstance(record, MetricRecord):
        record = MetricRecord({key: value for key, value in record.items() if value != []})
    return record.count_bytes()
