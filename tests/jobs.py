"""A method's real client in a real ClientApp, or its answer to one request, on a test's own data and model."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from fedpm_flwr import messages
from fedpm_flwr.algorithms import get_algorithm
from fedpm_flwr.config import Config
from fedpm_flwr.control_variates import VARIATE_ROUND
from fedpm_flwr.inline import task_identity
from fedpm_flwr.method import Job, Method
from fedpm_flwr.state import ClientState
from fedpm_flwr.training import Loss, derive_seed

from .apps import Data, tell_partitions

Spoil = Callable[[Job, int, Message], Message | None]
"""Sees each reply with its job and partition; may change it, put another in its place, or raise."""
Examples = tuple[Tensor, Tensor]


def untouched(job: Job, partition: int, reply: Message) -> None: ...


def job_on(
    batches: Sequence[Examples],
    config: Config,
    request: Message,
    model: nn.Module,
    loss: Loss,
    seed: int,
    state: ClientState,
    whole: Sequence[Examples] | None = None,
) -> Job:
    return Job(
        config=config,
        request=request,
        model=model,
        batches=batches,
        whole=batches if whole is None else whole,
        examples=sum(len(x) for x, _ in batches),
        steps_an_epoch=len(batches),
        loss=loss,
        device=torch.device("cpu"),
        seed=seed,
        state=state,
    )


def app_of(
    method: Method,
    config: Config,
    folder: Path,
    *,
    data: Data,
    make_model: Callable[[], nn.Module],
    loss: Loss,
    spoil: Spoil = untouched,
) -> ClientApp:
    """The method's client, on all its data in each step; its state is under ``folder``."""
    app = ClientApp()

    def job_of(message: Message, partition: int) -> Job:
        batch, model = data(partition), make_model()
        model.load_state_dict(message.content.array_records[messages.ARRAYS].to_torch_state_dict())
        run = messages.asked(message, messages.EXPERIMENT)
        assert run
        seed = derive_seed(config.seed, messages.server_round_of(message), partition)
        state = ClientState(folder, run, f"partition-{partition}")
        return job_on([batch], config, message, model, loss, seed, state)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition = messages.partition_of(context)[0]
        job = job_of(message, partition)
        reply = method.client(job)
        return spoil(job, partition, reply) or reply

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        job = job_of(message, messages.partition_of(context)[0])
        return messages.metrics_reply(message, job.metrics | (method.evaluate(job) if method.evaluate else {}))

    tell_partitions(app)
    return app


def answer(
    config: Config,
    model: nn.Module,
    batches: Sequence[Examples],
    common: dict[str, Tensor] | None = None,
    folder: Path | None = None,
    whole: Sequence[Examples] | None = None,
) -> Message:
    """A client's reply to a request of round 2, of cross-entropy; with this c, and cᵢ = 0."""
    asked: dict[str, Any] = {messages.SERVER_ROUND: 2, messages.CURVATURE_CODEC: config.codec}
    content = RecordDict({messages.ARRAYS: ArrayRecord(model.state_dict()), messages.CONFIG: ConfigRecord(asked)})
    state = ClientState(folder, "run", "a")
    if common is not None:
        content[messages.CONFIG] = ConfigRecord({**asked, VARIATE_ROUND: 1})
        content[messages.EXTRA] = messages.tensors_record(common)
        state.save(1, {key: torch.zeros_like(value) for key, value in common.items()})
    with task_identity(1):
        request = Message(content, dst_node_id=1, message_type="train")
        request.metadata.__dict__["_message_id"] = "1"
        job = job_on(batches, config, request, model, F.cross_entropy, 0, state, whole)
        return get_algorithm(config.algorithm).client(job)
