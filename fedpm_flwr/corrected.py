"""The client of corrected FedPM: local steps by gᵢ − cᵢ + c, kept only where they can be trusted.

gᵢ − cᵢ + c is the gradient of φᵢ(ϑ) = fᵢ(ϑ) − (cᵢ − c)ᵀϑ, the client's model of the global objective:
exact to first order where the pair was taken, and worth less the further the clients have moved since. A
client can tell by itself, at no exchange: its steps have to bring ‖∇φᵢ‖ down.

- A step sees all examples (``batch-size=0``): no step may raise it. Where P is the Hessian itself, each
  must bring it down to (1 − η/2) of what it was: where Newton's method converges, a step of length η
  leaves about 1 − η of it. If one does not, the client returns what it had after its first step, and the
  P of that step: with one step a client, the mixed step does not depend on the pair, since
  Σ wᵢ(cᵢ − c) = 0.
- A step sees a batch: all steps together must not raise it. If they do, or fail, the client starts again
  and takes them uncorrected, as in FedPM itself.
"""

import logging
from dataclasses import dataclass

from flwr.app import Message
from torch import Tensor

from . import control_variates as variates
from . import messages
from .curvature import CurvatureError, LayerCurvature
from .method import Job
from .objective import Objective
from .optim import SecondOrder, correct_gradients

_log = logging.getLogger("flwr")
CORRECTED = "corrected-steps"
"""A metric: how many of the local steps were taken by a corrected gradient."""


@dataclass(frozen=True)
class Stepped:
    """The curvature of steps that were taken, whatever the optimizer has done since."""

    layers: list[LayerCurvature]

    def preconditioners(self) -> list[LayerCurvature]:
        return self.layers


def client(job: Job) -> Message:
    """Answer a training request, or the request for ∇fᵢ(θ) that comes before it."""
    # Of what the optimizer steps by: decoupled weight decay is no part of the gradient.
    decay = 0.0 if job.config.decoupled_weight_decay else job.config.weight_decay
    objective = Objective(job.model, job.whole, job.loss, decay, job.device)
    gradient = objective.gradient()
    own = objective.by_name(gradient)
    if job.phase == messages.GRADIENT:
        return job.reply_tensors(own)
    addition = variates.pair(job.request, job.state, own)
    job.metrics[CORRECTED] = 0
    if job.steps_an_epoch == 1:
        stepped = _step_by_step(job, objective, gradient, addition)
    else:
        stepped = _all_or_none(job, objective, gradient, addition)
    job.keep(own, variates.counted_round(job.request))
    return job.reply(stepped, own)


def _step_by_step(job: Job, objective: Objective, gradient: Tensor, addition: dict[str, Tensor]) -> Stepped:
    """The K steps, or the first alone."""
    optimizer = _optimizer(job, addition)
    added = objective.to_vector(addition)
    job.train(optimizer, steps=1)
    job.metrics[CORRECTED] = int(bool(addition))
    first = Stepped(optimizer.preconditioners())
    state, metrics = _copy(job), dict(job.metrics)
    share = 1 - job.config.learning_rate / 2 if optimizer.is_newton else 1.0
    norm, taken = (gradient + added).norm(), 1
    while taken < job.steps:
        before, norm = norm, (objective.gradient() + added).norm()
        # Not the other way round: a norm that is no number fails too.
        if not norm <= share * before or not _trains(job, optimizer, steps=1):
            job.model.load_state_dict(state)
            job.metrics = metrics
            return first
        taken += 1
    job.metrics |= metrics | {"local-steps": taken, CORRECTED: taken if addition else 0}
    return Stepped(optimizer.preconditioners())


def _all_or_none(job: Job, objective: Objective, gradient: Tensor, addition: dict[str, Tensor]) -> Stepped:
    """All steps corrected, or all uncorrected."""
    if addition:
        state, metrics = _copy(job), dict(job.metrics)
        optimizer = _optimizer(job, addition)
        added = objective.to_vector(addition)
        if _trains(job, optimizer) and (objective.gradient() + added).norm() <= (gradient + added).norm():
            job.metrics[CORRECTED] = job.metrics["local-steps"]
            return Stepped(optimizer.preconditioners())
        optimizer.detach()
        job.model.load_state_dict(state)
        job.metrics = metrics
    optimizer = _optimizer(job, {})
    job.train(optimizer)
    return Stepped(optimizer.preconditioners())


def _optimizer(job: Job, addition: dict[str, Tensor]) -> SecondOrder:
    optimizer = job.second_order()
    added = {p: addition[name].to(p) for name, p in job.model.named_parameters() if name in addition}
    correct_gradients(optimizer, added.get)
    return optimizer


def _trains(job: Job, optimizer: SecondOrder, steps: int | None = None) -> bool:
    """Whether the steps could be taken, and did not diverge."""
    try:
        return job.train(optimizer, steps)
    except CurvatureError as error:
        _log.info("corrected steps ended: %s", error)
        return False


def _copy(job: Job) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in job.model.state_dict().items()}
