"""A federated method: what its clients do with a training request, and the strategy of its server."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.app import Message, MessageType, MetricRecord, RecordDict
from torch import Tensor, nn

from . import messages
from .config import Config
from .guarded import Guarded
from .objective import Objective
from .optim import SecondOrder
from .optimizers import second_order
from .privacy import refuse_differential_privacy
from .replies import read_tensors
from .state import ClientState
from .training import Batches, Loss, fit

_log = logging.getLogger("flwr")


@dataclass
class Job:
    """One training request, and what a client needs to answer it.

    Args:
        config: the run's settings.
        request: as it came.
        model: with the global model θ loaded, on the device.
        batches: the client's examples, in this round's order, and each pass in another; augmented, if asked for.
        whole: the same examples in batches as they lie, always the same: what objectives and tests are of.
        examples: nᵢ, how many.
        steps_an_epoch: batches in a pass over them.
        loss: the mean over a batch.
        device: to compute on.
        seed: of this client in this round.
        state: what the client keeps between rounds.
    """

    config: Config
    request: Message
    model: nn.Module
    batches: Batches
    whole: Batches
    examples: int
    steps_an_epoch: int
    loss: Loss
    device: torch.device
    seed: int
    state: ClientState
    metrics: dict[str, int | float] = field(default_factory=dict)
    """What the reply will say, beside what a method adds."""

    def __post_init__(self) -> None:
        self.metrics.setdefault(messages.NUM_EXAMPLES, self.examples)

    @property
    def server_round(self) -> int:
        """The round, from 1."""
        return messages.server_round_of(self.request)

    @property
    def phase(self) -> str:
        """Which exchange of the round this is: ``messages.TRAIN``, or as the strategy names it."""
        return messages.asked(self.request, messages.PHASE) or messages.TRAIN

    @property
    def steps(self) -> int:
        """K, the local steps to take."""
        return self.config.local_steps or self.config.local_epochs * self.steps_an_epoch

    @property
    def codec(self) -> str | None:
        """The codec by which a second-order optimizer steps: that of the request, in rounds of one step."""
        return messages.asked_codec(self.request) if self.steps == 1 else None

    @property
    def objective(self) -> Objective:
        """f of all the client's examples, weight decay included, at the model's parameters."""
        return Objective(self.model, self.whole, self.loss, self.config.weight_decay, self.device)

    def second_order(self, optimizer: str | None = None) -> SecondOrder:
        """The optimizer of this name, by default the one that the setting ``optimizer`` names."""
        return second_order(self.config, self.model, self.codec, name=optimizer, seed=self.seed)

    def extra(self) -> dict[str, Tensor]:
        """The tensors that the server sent beside the model; empty: none."""
        if messages.EXTRA not in self.request.content.config_records:
            return {}
        return {key: value.to(self.device) for key, value in read_tensors(self.request.content).items()}

    def newest_state(self) -> dict[str, Tensor]:
        """What was kept last, in a round before this one; an evaluation counts as after its round.

        There may be states of later rounds, of a run that broke off and was taken up at an earlier round.
        """
        is_train = self.request.metadata.message_type.split(".")[0] == MessageType.TRAIN
        return self.state.load(before=self.server_round + (not is_train))

    def keep(self, tensors: Mapping[str, Tensor], counted: int | None = None) -> None:
        """Keep these tensors for later rounds; a disk that cannot take them costs the state, not the reply.

        ``counted``: the round whose state the server still counts on, until it counts this one's.
        """
        try:
            self.state.save(self.server_round, tensors, counted)
        except OSError as error:
            _log.warning("client state could not be written, later rounds go on without it: %s", error)

    def train(self, optimizer: torch.optim.Optimizer, steps: int | None = None) -> bool:
        """Take the local steps (``training.fit``), note their metrics; whether they did not diverge."""
        result = fit(self.model, self.batches, optimizer, self.loss, steps=steps or self.steps, device=self.device)
        self.metrics |= {
            "train-loss": result.loss,
            "train-accuracy": result.accuracy,
            "local-steps": result.steps,
        }
        if result.diverged:
            self.metrics[messages.DIVERGED] = 1
        return not result.diverged

    def reply(self, optimizer: object = None, extra: Mapping[str, Tensor] | None = None) -> Message:
        """The model, the metrics so far, and further tensors; curvature if it is asked for.

        ``optimizer`` is what has it, a ``messages.Preconditioned``; any other has none.
        """
        message = messages.train_reply(self.request, self.model, self.metrics, optimizer)
        if extra:
            refuse_differential_privacy()
            message.content[messages.EXTRA] = messages.tensors_record(extra)
        return message

    def reply_tensors(self, extra: Mapping[str, Tensor]) -> Message:
        """A reply without the model: the metrics so far and these tensors."""
        refuse_differential_privacy()
        content = RecordDict({messages.METRICS: MetricRecord({**self.metrics})})
        content[messages.EXTRA] = messages.tensors_record(extra)
        return Message(content, reply_to=self.request)


def local_training(make: Callable[[Job], torch.optim.Optimizer]) -> Callable[[Job], Message]:
    """The client of a method that takes K steps of an optimizer, and replies."""

    def client(job: Job) -> Message:
        optimizer = make(job)
        job.train(optimizer)
        return job.reply(optimizer)

    return client


@dataclass(frozen=True)
class Method:
    """``client(job)`` answers a training request; ``strategy(config)`` makes the server's side.

    ``reads``: the settings that this method reads, of those that not all methods do.
    """

    client: Callable[[Job], Message]
    strategy: Callable[[Config], Guarded]
    reads: tuple[str, ...] = ()
    reads_optimizer: bool = False
    """Whether the client's optimizer is the one that the setting ``optimizer`` names."""
    evaluate: Callable[[Job], dict[str, float]] | None = None
    """Further metrics of a client's own, in the reply to an evaluation request, whose model is the global one."""


def shared_by_strategies(config: Config) -> dict[str, Any]:
    """The settings that every strategy takes, as keyword arguments."""
    return {
        "fraction_train": config.fraction_train,
        "fraction_evaluate": config.fraction_evaluate,
        "min_train_nodes": 1,
        "min_evaluate_nodes": 1 if config.fraction_evaluate else 0,
        "min_available_nodes": config.min_available_nodes,
        "min_replies": config.min_replies,
        "max_failed_rounds": config.max_failed_rounds,
        "weighting": config.weighting,
    }
