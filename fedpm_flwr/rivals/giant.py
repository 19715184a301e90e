"""GIANT (Wang, Roosta, Xu, Mahoney, NeurIPS 2018, arXiv 1709.03528): averaged local Newton directions.

A round is three exchanges with the same clients, wᵢ = nᵢ / Σ nⱼ, fᵢ with the L2 term ω/2 ‖θ‖²:

    gradient:      gᵢ = ∇fᵢ(θ)                        g = Σ wᵢ gᵢ                       [d]
    training:      pᵢ = (∇²fᵢ(θ) + λᵢI)⁻¹ g           p = Σ wᵢ pᵢ                       [d]
    line search:   fᵢ(θ − a p), a in 0, 1, ½, ¼, …    f(θ − a p) = Σ wᵢ fᵢ(θ − a p)     [``line-search-steps`` + 1]

    θ⁺ = θ − a p with the largest a > 0 for which f(θ − a p) ≤ f(θ) − β a pᵀg, β = 10⁻⁴

With equal ∇²fᵢ, p is Newton's direction of f; else the harmonic mean of the Hessians is in its place.

Where the source is silent, or we differ:

- The source's clients hold equally many examples, drawn alike: their mean is our weighted one.
- The source solves by conjugate gradients; here the Hessian is exact and factored (Cholesky), λᵢ = 0.
  Where it is not positive definite, λᵢ is the first of ``damping`` · 1, 10, 100, … by which it is.
- The candidates a of the authors' code are 1, ¼, 1/16, …, ten of them; these are halved.
- If no candidate meets the condition, that of the least f is taken; it may be a = 0, and θ stays. So with
  all clients present f never rises.
- ``line-search-steps`` = 0: no third exchange, a = ``server-learning-rate``.
- Clients whose gradient is left out are not asked for a direction, nor those whose direction is left out
  for values. With partial participation all three exchanges are with the round's sample, which then is
  all of f: there is no state, but steps and line search fit the sample.
"""

from collections.abc import Iterable
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from torch import Tensor

from .. import messages
from ..config import Config
from ..messages import GRADIENT
from ..method import Job, Method, shared_by_strategies
from ..rewriting import with_extra
from .directions import DAMPING, DIRECTION, DirectionMean, Kept, node_of, solve_damped
from .vectors import check_whole

LINE_SEARCH = "line-search"
"""The exchange after the training requests."""
VALUES = "values"
ARMIJO = 1e-4
"""β, the share of the first-order decrease that a step must bring."""


class GIANT(DirectionMean):
    """GIANT's server.

    Args:
        line_search_steps: how many candidates 1, ½, ¼, …; 0: no line search.
        server_learning_rate: a without a line search.
        strategy: what ``Guarded`` takes.
    """

    def __init__(self, *, line_search_steps: int = 10, server_learning_rate: float = 1.0, **strategy: Any) -> None:
        super().__init__(**strategy)
        self.line_search_steps = line_search_steps
        self.server_learning_rate = server_learning_rate

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask the round's clients for their gradients; send those who gave one the mean of them."""
        requests = list(super().configure_train(server_round, arrays, config, grid))
        kept = self._exchange(server_round, grid, requests, GRADIENT, {}, {GRADIENT: len(self.theta_vector())})
        if not kept:
            return []
        nodes = {node_of(reply) for reply, _ in kept}
        self._grid = grid
        self._requests = [request for request in requests if request.metadata.dst_node_id in nodes]
        self._gradient = self.mean(kept, GRADIENT)
        record = messages.tensors_record({GRADIENT: self._gradient})
        return [with_extra(request, record) for request in self._requests]

    def step_length(self, server_round: int, direction: Tensor, kept: Kept) -> float:
        """a, by one more exchange with those whose directions were averaged.

        Raises:
            ValueError: none of them can say fᵢ.
        """
        if not self.line_search_steps:
            return self.server_learning_rate
        nodes = {node_of(reply) for reply, _ in kept}
        requests = [request for request in self._requests if request.metadata.dst_node_id in nodes]
        lengths = candidates(self.line_search_steps)
        extra, sizes = {DIRECTION: direction}, {VALUES: len(lengths)}
        answers = self._exchange(server_round, self._grid, requests, LINE_SEARCH, extra, sizes)
        values = self.mean(answers, VALUES).tolist()
        return armijo(lengths, values, float(direction.double() @ self._gradient.double()))

    def _exchange(
        self,
        server_round: int,
        grid: Grid,
        requests: list[Message],
        phase: str,
        extra: dict[str, Tensor],
        sizes: dict[str, int],
    ) -> Kept:
        """The usable replies to one more exchange, with the vectors of these sizes."""
        shapes = {name: (size,) for name, size in sizes.items()}
        replies = self.ask(server_round, grid, requests, phase, extra) if requests else []
        return list(self.usable(server_round, replies, lambda reply: self.read_named(reply, shapes)))


def candidates(steps: int) -> list[float]:
    """The step lengths whose values clients tell: 0, 1, ½, ¼, …

    >>> candidates(3)
    [0.0, 1.0, 0.5, 0.25]
    """
    return [0.0, *(0.5**k for k in range(steps))]


def armijo(lengths: list[float], values: list[float], slope: float) -> float:
    """The largest a > 0 with f(a) ≤ f(0) − β a pᵀg, or the a of the least f if there is none.

    ``lengths`` start with 0, ``values`` are f(a), ``slope`` is pᵀg.

    >>> armijo([0.0, 1.0, 0.5], [1.0, 2.0, 0.5], 1.0), armijo([0.0, 1.0, 0.5], [1.0, 2.0, 3.0], 1.0)
    (0.5, 0.0)
    """
    tried = list(zip(lengths, values, strict=True))
    enough = [a for a, value in tried if a and value <= values[0] - ARMIJO * a * slope]
    return max(enough) if enough else min(tried, key=lambda pair: pair[1])[0]


def _client(job: Job) -> Message:
    """One of the three exchanges, as ``job.phase`` says."""
    check_whole(job.model, len(job.objective.theta))
    return job.reply_tensors(
        {GRADIENT: _gradient, messages.TRAIN: _direction, LINE_SEARCH: _values}[job.phase](job)
    )


def _gradient(job: Job) -> dict[str, Tensor]:
    return {GRADIENT: job.objective.gradient()}


def _direction(job: Job) -> dict[str, Tensor]:
    """pᵢ."""
    hessian = job.objective.hessian(max_side=job.config.max_factor_side)
    direction, used = solve_damped(hessian, job.extra()[GRADIENT], 0.0, job.config.damping)
    job.metrics[DAMPING] = used
    return {DIRECTION: direction}


def _values(job: Job) -> dict[str, Tensor]:
    """fᵢ at the candidates; what is beyond the dtype is its largest number, which no line search takes."""
    objective, direction = job.objective, job.extra()[DIRECTION]
    theta, values = objective.theta, []
    for a in candidates(job.config.line_search_steps):
        objective.move_to(theta - a * direction)
        values.append(objective.value())
    largest = torch.finfo(theta.dtype).max ** 0.5  # what a reply may hold
    return {VALUES: torch.tensor(values, dtype=theta.dtype).nan_to_num(nan=largest).clamp(max=largest)}


def _strategy(config: Config) -> GIANT:
    return GIANT(
        line_search_steps=config.line_search_steps,
        server_learning_rate=config.server_learning_rate,
        **shared_by_strategies(config),
    )


METHOD = Method(
    client=_client,
    strategy=_strategy,
    reads=("line-search-steps", "server-learning-rate", "damping", "max-factor-side", "weight-decay"),
)
