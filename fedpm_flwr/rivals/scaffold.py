"""SCAFFOLD (Karimireddy et al., ICML 2020, arXiv 1910.06378): local SGD, corrected by control variates.

Client i, of those sampled S, keeps cᵢ; the server holds c = Σ pᵢ cᵢ over all N nodes, pᵢ = nᵢ / Σ nⱼ. All are in
the shape of θ and start at 0. In a round (Algorithm 1, option II for the variates), with wᵢ = nᵢ / Σ_S nⱼ:

    θᵢ ← θᵢ − η (gᵢ − cᵢ + c) (K times),              cᵢ⁺ = cᵢ − c + (θ − θᵢ) / (K η)
    θ⁺ = θ + η_s Σ_S wᵢ (θᵢ − θ),                     c⁺ = c + Σ_S pᵢ (cᵢ⁺ − cᵢ)

cᵢ⁺ is the mean gradient of the K steps. Up go θᵢ and cᵢ⁺ − cᵢ, down θ and c. η_s is ``server-learning-rate``.
With ``weighting="uniform"`` all nᵢ count as 1: that is the source, where wᵢ = 1/|S| and c⁺ = c + |S|/N times the
mean of the changes. By default clients count by their examples, as in FedAvg here.

Everything rests on c = Σ pᵢ cᵢ: where c is off by b, the fixed point is not the optimum but where the global
gradient is −b, and no later round mends it. The source has no failures; here (inferred):

- The server keeps Σ nᵢ cᵢ, and for each node the round whose cᵢ is in it. It names that round in its request, so a
  client whose last replies were lost, left out, or of failed rounds steps with the cᵢ of that round, not its
  newest; however many they were, it keeps that cᵢ beside its newest.
- A client that does not have it (its disk was emptied, or could not take it) steps with cᵢ = 0 and says so. What
  it had cannot be subtracted from c any more, so after that round, whose models are averaged as ever, the server
  begins anew with c = 0 and asks every client to begin with cᵢ = 0. That costs the variates' head start, and
  keeps the optimum.
- N counts the nodes that are connected or whose cᵢ is in c: a node that has left is as one not sampled. Those not
  heard of yet count by the mean nᵢ of the others, and a node's nᵢ in c stays what it first was.
- Buffers have no variate, and move by the same mean as θ. Clients step without momentum: only then is cᵢ⁺ a mean
  gradient.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from torch import Tensor, nn

from .. import messages
from ..config import Config
from ..method import Job, Method, shared_by_strategies
from ..optim import correct_gradients
from ..optimizers import SGD_READS, sgd
from ..replies import Update, read_tensors, with_common_metrics
from ..report import PREFIX
from ..rewriting import with_extra
from .memory import Remembering

STATE_ROUND = "state-round"
"""In the request's config: the round whose cᵢ is in c; 0: none is."""
LOST = "lost-variates"
"""A metric: 1 where the client has no cᵢ of that round any more."""
_log = logging.getLogger("flwr")


@dataclass(frozen=True, eq=False)
class VariateUpdate(Update):
    """A checked reply with cᵢ⁺ − cᵢ by the names of θ's floating-point arrays, and whether cᵢ was lost."""

    change: dict[str, Tensor]
    lost: bool


class Scaffold(Remembering):
    """The server's side.

    Args:
        server_learning_rate: η_s.
        strategy: as for ``Guarded``.
    """

    memory = ("_sum", "_counted")

    def __init__(self, *, server_learning_rate: float = 1.0, **strategy: Any) -> None:
        super().__init__(**strategy)
        self.server_learning_rate = server_learning_rate
        self._sum: dict[str, Tensor] | None = None
        """Σ nᵢ cᵢ; None: 0."""
        self._counted: dict[int, tuple[int, float]] | None = None
        """By client, the round whose cᵢ is in the sum, and nᵢ."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """θ and c, and to each node the round whose cᵢ is in c."""
        requests = list(super().configure_train(server_round, arrays, config, grid))
        counted = self._counted or {}
        nodes = len({*map(self.client_of, grid.get_node_ids()), *counted})
        mean = sum(weight for _, weight in counted.values()) / max(len(counted), 1)
        c = {key: total / (nodes * mean) for key, total in (self._sum or {}).items()}
        record = messages.tensors_record(c)
        return [
            with_extra(request, record, {STATE_ROUND: counted[client][0] if client in counted else 0})
            for request in requests
            for client in [self.client_of(request.metadata.dst_node_id)]
        ]

    def read(self, reply: Message) -> VariateUpdate:
        """The checked update in a training reply, with the change of the client's variate.

        Raises:
            ReplyError: the reply cannot be used.
        """
        update = super().read(reply)
        shapes = {key: value.shape for key, value in self._theta.items() if value.is_floating_point()}
        change = read_tensors(reply.content, shapes)
        (metrics,) = reply.content.metric_records.values()
        return VariateUpdate(update.state, [], update.weight, change, bool(metrics.get(LOST)))

    def combine(
        self, server_round: int, usable: Iterable[tuple[Message, Update]]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """θ⁺, and c⁺ to be kept.

        Raises:
            ValueError: θ⁺ is not finite.
        """
        moved = {key: torch.zeros_like(value, dtype=_wide(value)) for key, value in self._theta.items()}
        total, counted = dict(self._sum or {}), dict(self._counted or {})
        contents, weights, lost = list[RecordDict](), 0.0, 0
        for reply, update in usable:
            assert isinstance(update, VariateUpdate)
            for key, value in update.state.items():
                moved[key] += update.weight * (value.to(moved[key].dtype) - self._theta[key].to(moved[key].dtype))
            client = self.client_of(reply.metadata.src_node_id)
            counted[client] = server_round, counted[client][1] if client in counted else update.weight
            for key, change in update.change.items():
                total[key] = total.get(key, 0.0) + counted[client][1] * change
            contents.append(reply.content)
            weights += update.weight
            lost += update.lost
        if not contents:
            return None, None
        self._sum, self._counted = total, counted
        if lost:
            self._forget(server_round, lost)
        arrays = self._as_sent(ArrayRecord(self._stepped(moved, weights)))
        return arrays, self.train_metrics_aggr_fn(with_common_metrics(contents), self.weighted_by_key)

    def _stepped(self, moved: Mapping[str, Tensor], weights: float) -> dict[str, Tensor]:
        """θ + η_s Σ wᵢ (θᵢ − θ), from the sum weighed by nᵢ and Σ nᵢ; whole numbers are averaged."""
        state = {}
        for key, old in self._theta.items():
            length = self.server_learning_rate if old.is_floating_point() else 1.0
            state[key] = old.to(moved[key].dtype) + length * moved[key] / weights
        return state

    def _forget(self, server_round: int, lost: int) -> None:
        """Begin anew with c = 0 and all cᵢ = 0."""
        _log.warning(
            "%sround %d: %d clients have lost their control variates: all begin anew", PREFIX, server_round, lost
        )
        self._sum = self._counted = None


def client(job: Job) -> Message:
    """K corrected steps; the reply has cᵢ⁺ − cᵢ under the names of the model's floating-point arrays.

    Raises:
        OSError: the state cannot be kept.
    """
    arrays = {key: p for key, p in job.model.state_dict(keep_vars=True).items() if p.is_floating_point()}
    theta = {key: p.detach().clone() for key, p in arrays.items()}
    zeros = {key: torch.zeros_like(value) for key, value in theta.items()}
    c, own = job.extra() or zeros, _own_variate(job) or zeros
    drift = {p: c[key] - own[key] for key, p in arrays.items()}
    optimizer = sgd(replace(job.config, momentum=0.0), job.model)
    correct_gradients(optimizer, lambda p: drift[p])
    if not job.train(optimizer):
        return job.reply(optimizer)
    length = max(int(job.metrics["local-steps"]), 1) * job.config.learning_rate
    new = {
        key: own[key] - c[key] + (theta[key] - p.detach()) / length if _has_variate(p) else zeros[key]
        for key, p in arrays.items()
    }
    job.keep(new, _counted_round(job))
    return job.reply(optimizer, {key: new[key] - own[key] for key in new})


def _own_variate(job: Job) -> dict[str, Tensor]:
    """The cᵢ that the server's c has; empty: 0. Notes whether it is lost."""
    counted = _counted_round(job)
    own = job.state.load(counted) if counted else {}
    job.metrics[LOST] = int(counted > 0 and not own)
    return {key: value.to(job.device) for key, value in own.items()}


def _counted_round(job: Job) -> int:
    """The round whose cᵢ the server's c has; 0: none."""
    return int(messages.asked(job.request, STATE_ROUND) or 0)


def _has_variate(p: Tensor) -> bool:
    return isinstance(p, nn.Parameter) and p.requires_grad


def _wide(value: Tensor) -> torch.dtype:
    """Whole numbers are summed as float64."""
    return value.dtype if value.is_floating_point() else torch.float64


def _strategy(config: Config) -> Scaffold:
    return Scaffold(server_learning_rate=config.server_learning_rate, **shared_by_strategies(config))


METHOD = Method(
    client=client,
    strategy=_strategy,
    reads=(*(key for key in SGD_READS if key != "momentum"), "server-learning-rate"),
)
