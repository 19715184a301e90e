"""What the methods share whose clients send a direction pᵢ [d] instead of a model: θ⁺ = θ − a Σ wᵢ pᵢ."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

import torch
from flwr.app import ArrayRecord, Message, MetricRecord
from torch import Tensor

from ..curvature import CurvatureError
from ..curvature.linalg import add_to_diagonal, check_positive_definite, cholesky_solve
from ..guarded import Guarded
from ..replies import Update, read_tensors, with_common_metrics
from .vectors import from_vector, to_vector

DIRECTION = "direction"
"""The tensor pᵢ in a client's reply, and the mean of them in the server's requests."""
DAMPING = "damping"
"""A metric: by which λ a client's matrix was really damped."""

_RAISE_DAMPING_BY = 10.0
_MAX_RAISES = 8

Kept = Sequence[tuple[Message, Update]]


class DirectionMean(Guarded):
    """Averages the clients' directions: θ⁺ = θ − a p, p = Σ wᵢ pᵢ, wᵢ = nᵢ / Σ nⱼ, a = ``step_length``.

    The replies hold no model. θ's floating-point entries are the vector [d] of ``vectors.to_vector``; a
    reply of another length, as from a model with running statistics, is left out.
    """

    def read(self, reply: Message) -> Update:
        """The checked direction, as the state of an update.

        Raises:
            ReplyError: the reply cannot be used.
        """
        return self.read_named(reply, {DIRECTION: self.theta_vector().shape})

    def read_named(self, reply: Message, shapes: Mapping[str, Sequence[int]]) -> Update:
        """Checked tensors of these shapes, as the state of an update with the client's weight.

        Raises:
            ReplyError: the reply cannot be used.
        """
        weight = self.weight_in(reply)
        return Update(read_tensors(reply.content, shapes), [], weight)

    def theta_vector(self) -> Tensor:
        """θ, [d]."""
        return to_vector(self._theta)

    def mean(self, kept: Kept, name: str) -> Tensor:
        """Σ wᵢ vᵢ over the tensors of this name, summed in float64, in θ's dtype.

        Raises:
            ValueError: there are none.
        """
        total = sum(update.weight for _, update in kept)
        if not total:
            raise ValueError(f"no usable reply holds a {name!r}")
        shares = [update.state[name].double() * (update.weight / total) for _, update in kept]
        return torch.stack(shares).sum(0).to(self.theta_vector().dtype)

    def combine(
        self, server_round: int, usable: Iterable[tuple[Message, Update]]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Step against the mean direction.

        Raises:
            ValueError: there is no direction, or the new model is not finite.
        """
        kept = list(usable)
        direction = self.mean(kept, DIRECTION)
        length = self.step_length(server_round, direction, kept)
        moved = from_vector(self.theta_vector() - length * direction, self._theta)
        contents = with_common_metrics([reply.content for reply, _ in kept])
        return self._as_sent(ArrayRecord(moved)), self.train_metrics_aggr_fn(contents, self.weighted_by_key)

    def step_length(self, server_round: int, direction: Tensor, kept: Kept) -> float:
        """a, by which the mean direction is multiplied."""
        return 1.0


def node_of(reply: Message) -> int:
    """The node that a reply is from."""
    return reply.metadata.src_node_id


def solve_damped(matrix: Tensor, rhs: Tensor, damping: float, raised: float) -> tuple[Tensor, float]:
    """(M + λI)⁻¹ R by Cholesky, and λ: ``damping``, or the least of ``raised`` · 1, 10, 100, … that serves.

    M is [d, d] and symmetric, R is [d]. M + λI serves if its least eigenvalue is above 100 ε times its
    trace: below, what Cholesky finds is rounding errors divided by next to nothing.

    Raises:
        CurvatureError: none does, or M is not finite.
    """
    attempts = [damping, *(raised * _RAISE_DAMPING_BY**k for k in range(_MAX_RAISES + 1) if raised)]
    for used in attempts[:-1]:
        with suppress(CurvatureError):
            return _solve(add_to_diagonal(matrix, used), rhs), used
    return _solve(add_to_diagonal(matrix, attempts[-1]), rhs), attempts[-1]


def _solve(matrix: Tensor, rhs: Tensor) -> Tensor:
    check_positive_definite(matrix)
    return cholesky_solve(matrix, rhs[:, None])[:, 0]
