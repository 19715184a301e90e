"""FedNew (Elgabli, Issaid, Bedi, Rajawat, Bennis, Aggarwal, ICML 2022, arXiv 2206.08829): ADMM, a pass a round.

Newton's direction minimises Σ wᵢ (½ yᵢᵀ(Hᵢ + αI)yᵢ − yᵢᵀgᵢ) over yᵢ = y, wᵢ = nᵢ / Σ nⱼ. A round is one
pass of ADMM for it, and a step; all are vectors [d], Hᵢ and gᵢ are of fᵢ with the L2 term ω/2 ‖θ‖²:

    client:   yᵢ⁺ = (Hᵢ + (α + ρ)I)⁻¹ (gᵢ − λᵢ + ρ y)
    server:   y⁺ = Σ wᵢ yᵢ⁺,      θ⁺ = θ − y⁺
    client:   λᵢ⁺ = λᵢ + ρ (yᵢ⁺ − y⁺)

α is ``damping``, ρ ``fednew-rho``. Hᵢ is measured anew every ``fednew-refresh`` rounds, 0: only once. It
never leaves the client, nor does gᵢ: only yᵢ is sent. At a fixed point y = yᵢ = 0 and λᵢ = gᵢ, which is the
optimum if and only if Σ wᵢ λᵢ = 0.

That sum is kept: λᵢ starts at 0, and Σ wᵢ (yᵢ⁺ − y⁺) = 0 by the server's own mean. It needs each client to
apply the y⁺ of just those rounds in which its yᵢ⁺ was counted. So the server tells each client the last such
round r and its y⁺, and the client updates the λᵢ that it kept from round r; a reply that was left out, or a
round that failed, changes no λᵢ. A client that was absent applies nothing for these rounds, and what is due
from its last one when it is back. Σ nᵢ λᵢ over all clients stays 0 with partial participation too.

A client without its state of round r starts from λᵢ = 0 and a new Hᵢ, and says so (``lost-duals``). With the
others' λᵢ the sum would no longer be 0, but its lost −nᵢ λᵢ for ever, and θ would settle where Σ wᵢ gᵢ is that
much. So from the next round on all clients start from λᵢ = 0 again; the Hessians stay. Clients that lose
their state all the time thus never have duals: averaged damped Newton directions with momentum, whose
fixed point is not the optimum if clients differ.

Where the source is silent, or we differ: its mean is uniform, wᵢ = 1/n, and all clients take part in all
rounds; its server adds Σ λᵢ/(nρ) to the mean, which is 0 (the authors' code); it takes fᵢ as sums over examples,
so that its α and ρ are in other units. Where Hᵢ + (α + ρ)I is not positive definite, α + ρ is raised tenfold
until it is.
"""

from collections.abc import Iterable
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from torch import Tensor

from .. import messages
from ..method import Job, Method, shared_by_strategies
from ..replies import Update
from ..rewriting import with_extra
from .directions import DAMPING, DIRECTION, DirectionMean, node_of, solve_damped
from .vectors import check_whole

LATEST = "latest-direction"
"""Sent down: y of the last round that did not fail; absent: 0."""
COUNTED_DIRECTION = "counted-direction"
"""Sent down: y of the round ``COUNTED``, if that is not the latest."""
COUNTED = "counted-round"
"""In the request's config: the last round in which this client's yᵢ was counted; 0: none."""
VOID = "void-round"
"""In the request's config: duals of rounds up to this one are 0."""
LOST = "lost-duals"
"""A metric: not 0 where the client should have a dual and has none."""

_DUAL, _HESSIAN, _MEASURED = "dual", "hessian", "measured"


class FedNew(DirectionMean):
    """FedNew's server: the mean of the yᵢ, and who has to apply which of these means.

    It keeps, for each client that was ever counted, the number of the round, and y of these rounds.
    """

    memory = ("_directions", "_counted", "_void")

    def __init__(self, **strategy: Any) -> None:
        super().__init__(**strategy)
        self._forget()

    def _forget(self) -> None:
        self._directions: dict[int, Tensor] = {}
        self._counted: dict[int, int] = {}
        self._void = 0
        self._pending: tuple[Tensor, set[int], bool] | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the latest y, and to each client what its dual needs."""
        if server_round == 1:
            self._forget()
        return [self._informed(request) for request in super().configure_train(server_round, arrays, config, grid)]

    def combine(
        self, server_round: int, usable: Iterable[tuple[Message, Update]]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Step against the mean direction, and note whose it is.

        Raises:
            ValueError: there is no direction, or the new model is not finite.
        """
        kept = list(usable)
        lost = any(record.get(LOST) for reply, _ in kept for record in reply.content.metric_records.values())
        made = super().combine(server_round, kept)
        self._pending = self.mean(kept, DIRECTION), {self.client_of(node_of(reply)) for reply, _ in kept}, lost
        return made

    def accepted(self, server_round: int) -> None:
        """The round counts for its clients; one that fails after all counts for none."""
        super().accepted(server_round)
        assert self._pending is not None  # of this round's combine
        direction, clients, lost = self._pending
        self._directions[server_round] = direction
        self._counted |= dict.fromkeys(clients, server_round)
        if lost:
            self._void = server_round
        needed = {*self._counted.values(), server_round}
        self._directions = {number: y for number, y in self._directions.items() if number in needed}

    def _informed(self, request: Message) -> Message:
        """The request with y, and with the round that the client's dual waits for."""
        counted = self._counted.get(self.client_of(request.metadata.dst_node_id), 0)
        latest = max(self._directions, default=0)
        extra = {LATEST: self._directions[latest]} if latest else {}
        if counted and counted != latest:
            extra[COUNTED_DIRECTION] = self._directions[counted]
        return with_extra(request, extra, {COUNTED: counted, VOID: self._void})


def _client(job: Job) -> Message:
    """yᵢ, and the state that the next round needs."""
    objective, sent, rho = job.objective, job.extra(), job.config.fednew_rho
    check_whole(job.model, len(objective.theta))
    gradient = objective.gradient()
    latest = sent.get(LATEST, torch.zeros_like(gradient))
    dual, lost = _dual(job, sent.get(COUNTED_DIRECTION, latest))
    hessian, measured = _hessian(job)
    damping = job.config.damping + rho
    direction, used = solve_damped(hessian, gradient - dual + rho * latest, damping, 10 * damping)
    state = {_DUAL: dual, DIRECTION: direction}
    if job.config.fednew_refresh != 1:
        state |= {_HESSIAN: hessian, _MEASURED: torch.tensor(measured)}
    job.keep(state, int(messages.asked(job.request, COUNTED) or 0))
    job.metrics |= {DAMPING: used, LOST: int(lost)}
    return job.reply_tensors({DIRECTION: direction})


def _dual(job: Job, mean: Tensor) -> tuple[Tensor, bool]:
    """λᵢ [d] after the update that is due, by the mean y of that round; and whether it was lost."""
    counted, void = (int(messages.asked(job.request, key) or 0) for key in (COUNTED, VOID))
    if counted <= void:  # nothing was ever counted, or all start anew
        return torch.zeros_like(mean), False
    state = job.state.load(counted)
    if not state:
        return torch.zeros_like(mean), True
    dual, own = state[_DUAL].to(mean), state[DIRECTION].to(mean)
    return dual + job.config.fednew_rho * (own - mean), False


def _hessian(job: Job) -> tuple[Tensor, int]:
    """Hᵢ [d, d], and the round that it was measured in: the stored one, while it is fresh enough."""
    refresh = job.config.fednew_refresh
    state = job.newest_state() if refresh != 1 else {}
    if state and (refresh == 0 or job.server_round - int(state[_MEASURED]) < refresh):
        return state[_HESSIAN].to(job.device), int(state[_MEASURED])
    return job.objective.hessian(max_side=job.config.max_factor_side), job.server_round


METHOD = Method(
    client=_client,
    strategy=lambda config: FedNew(**shared_by_strategies(config)),
    reads=("fednew-rho", "fednew-refresh", "damping", "max-factor-side", "weight-decay"),
)
