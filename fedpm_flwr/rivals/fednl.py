"""FedNL (Safaryan, Islamov, Qian and Richtárik, ICML 2022, arXiv 2106.02969, Algorithm 1): Hessians are learned.

Client i sends ∇fᵢ(θ), [d], and the compressed difference C(Dᵢ), never its Hessian:

    Dᵢ = ∇²fᵢ(θ) − Hᵢ,      Hᵢ⁺ = Hᵢ + α C(Dᵢ)                                     [d, d]

The server keeps the same Hᵢ, and steps by those from before this round's update, H = Σ wᵢ Hᵢ:

    option 1:  θ⁺ = θ − η_s [H]_μ⁻¹ ∇f(θ)          [H]_μ: eigenvalues of H below μ raised to μ
    option 2:  θ⁺ = θ − η_s (H + lI)⁻¹ ∇f(θ)       l = Σ wᵢ lᵢ,  lᵢ = ‖Dᵢ‖_F

C is nothing, the best approximation of rank R, or the K largest entries (``compressors``). Hᵢ starts as
∇²fᵢ(θ), of which the whole triangle is sent once (Dᵢ is 0 then), or as 0. fᵢ has weight decay in it.

Settings: α ``hessian-learning-rate``, μ ``hessian-floor``, C ``compressor``, R or K ``compressor-size``, the
start ``initial-hessian``. η_s is 1 in the source, and wᵢ is 1/n there; here it is nᵢ/Σnⱼ, as for FedPM.

Inferred, the source being silent or different:

- Only some clients take part in a round. (The source's FedNL-PP keeps old models as well, and averages
  gradients corrected by Hᵢ.) Here ∇f is the mean over the participants; H and l over all clients that the
  server knows, those that do not take part with their last Hᵢ, lᵢ and nᵢ; only the participants' Hᵢ move.
- A client without its state, or new. The server counts Hᵢ of each node on its own, and each request says of
  which round the client's Hᵢ must be. A client that has lost it starts anew, as at first, and says so; the
  server then forgets the Hᵢ that it had. So both sides always have the same Hᵢ, up to rounding. If a round
  fails, or a reply is left out, Hᵢ stays on both sides.
- The server's Hᵢ are in memory: d² numbers for each client that ever took part.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from torch import Tensor

from .. import messages
from ..config import Config
from ..curvature.linalg import add_to_diagonal, cholesky_solve, eigh
from ..messages import GRADIENT
from ..method import Job, Method, shared_by_strategies
from ..replies import ReplyError, Update, read_tensors
from ..rewriting import with_extra
from .compressors import COMPRESSORS, PLACES, entries
from .server_step import ServerStep, Slope, mean_gradient
from .vectors import check_side, check_whole, lower_triangle, symmetric

COUNTED = "hessian-round"
"""In a request: the round after which the Hᵢ is that the server has of this client; 0: it has none."""
BASE, ERROR, START = "base", "error", "start"
"""In a reply: that round, or 0 where the client starts from 0; lᵢ; the triangle of the Hᵢ that it starts from."""
_HESSIAN = "hessian"


def client(job: Job) -> Message:
    """Send the gradient, and what the server lacks of the Hessian."""
    check_side(len(job.objective.theta), job.config.max_factor_side)
    check_whole(job.model, len(job.objective.theta))
    objective, counted = job.objective, int(messages.asked(job.request, COUNTED) or 0)
    hessian = objective.hessian(max_side=job.config.max_factor_side)
    job.metrics["train-loss"] = objective.value()
    known = job.state.load(counted).get(_HESSIAN) if counted else None
    extra = {GRADIENT: objective.gradient()}
    if known is None and job.config.initial_hessian == "exact":
        job.keep({_HESSIAN: hessian}, counted)
        return job.reply(extra=extra | {START: lower_triangle(hessian)})
    if known is None:
        counted, known = 0, torch.zeros_like(hessian)
    compressor, known = COMPRESSORS[job.config.compressor], known.to(hessian)
    difference = hessian - known
    # Restored from what travels, on the CPU: the same Hᵢ as the server's.
    sent = {key: part.cpu() for key, part in compressor.compress(difference, job.config.compressor_size).items()}
    learned = compressor.restore(sent, len(hessian))
    job.keep({_HESSIAN: known.cpu() + job.config.hessian_learning_rate * learned}, counted)
    base = hessian.new_tensor([counted])
    return job.reply(extra=extra | sent | {BASE: base, ERROR: difference.norm().reshape(1)})


class _Estimate(NamedTuple):
    """What the server has of one client."""

    hessian: Tensor
    """Hᵢ, [d, d]."""
    error: float
    """lᵢ."""
    weight: float
    server_round: int
    """After which the client has this Hᵢ."""


@dataclass(frozen=True, eq=False)
class _Learned(Slope):
    """A checked reply."""

    before: Tensor
    """Hᵢ, [d, d], for this round's step."""
    change: Tensor
    """C(Dᵢ), [d, d]."""
    error: float
    """lᵢ."""


class FedNL(ServerStep):
    """Learns the Hessian of each client from compressed differences, and takes Newton's steps by their mean.

    Args:
        config: of the run.
        strategy: what ``ServerStep`` takes.
    """

    memory = ("_known",)

    def __init__(self, config: Config, **strategy: Any) -> None:
        super().__init__(**strategy)
        self._config = config
        self._compressor = COMPRESSORS[config.compressor]
        self._known: dict[int, _Estimate] = {}

    def recall(self, remembered: Mapping[str, Any]) -> None:
        """As Guarded."""
        super().recall(remembered)
        self._known = {client: _Estimate(*known) for client, known in self._known.items()}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send θ, and tell each client which Hᵢ is counted on.

        Raises:
            ValueError: the model has too many parameters.
        """
        if server_round == 1:  # as for the experiment's name: clients have nothing of this run yet
            self._known = {}
        requests = super().configure_train(server_round, arrays, config, grid)
        return [with_extra(request, {}, {COUNTED: self._counted(request)}) for request in requests]

    def read(self, reply: Message) -> Update:
        """The checked gradient and change of Hᵢ in a reply.

        Raises:
            ReplyError: the reply cannot be used.
        """
        update, theta = super().read(reply), self.parameters
        side = len(theta)
        shapes: dict[str, tuple[int, ...]] = {GRADIENT: (side,)}
        starts = START in read_tensors(reply.content)
        if starts:
            shapes |= {START: (entries(side),)}
        else:
            shapes |= {BASE: (1,), ERROR: (1,), **self._compressor.shapes(side, self._config.compressor_size)}
        tensors = {
            key: value if key == PLACES else value.to(theta.dtype)  # places in a dtype that holds them
            for key, value in read_tensors(reply.content, shapes).items()
        }
        if starts:
            before, error = symmetric(tensors[START], side), 0.0
            change = torch.zeros_like(before)
        else:
            before, error = self._before(reply, float(tensors[BASE]), side), float(tensors[ERROR])
            change = self._compressor.restore(tensors, side)
        if error < 0 or not torch.isfinite(change).all():
            raise ReplyError(f"its {messages.EXTRA!r} tensors are no difference of Hessians and its norm")
        return _Learned(update.state, [], update.weight, tensors[GRADIENT], before, change, error)

    def direction(self, server_round: int, kept: Sequence[tuple[Message, Update]]) -> Tensor:
        """[H]_μ⁻¹ g, or (H + lI)⁻¹ g.

        Raises:
            CurvatureError: H has no eigenvalues, or H + lI is not positive definite.
        """
        known = {**self._known, **self._estimates(server_round, kept, rate=0.0)}
        total, gradient = sum(one.weight for one in known.values()), mean_gradient(kept)
        hessian = gradient.new_zeros(len(gradient), len(gradient))
        for one in known.values():
            hessian += one.hessian * (one.weight / total)
        if self._config.fednl_option == 2:
            error = sum(one.error * one.weight / total for one in known.values())
            return cholesky_solve(add_to_diagonal(hessian, error), gradient[:, None])[:, 0]
        values, vectors = eigh(hessian)
        return vectors @ ((vectors.T @ gradient) / values.clamp(min=self._config.hessian_floor))

    def step_taken(self, server_round: int, kept: Sequence[tuple[Message, Update]]) -> None:
        """Hᵢ ← Hᵢ + α C(Dᵢ), as the clients have done."""
        self._known |= self._estimates(server_round, kept, rate=self._config.hessian_learning_rate)

    def _estimates(
        self, server_round: int, kept: Sequence[tuple[Message, Update]], rate: float
    ) -> dict[int, _Estimate]:
        """Hᵢ + rate · C(Dᵢ) of the participants."""
        return {
            self.client_of(reply.metadata.src_node_id): _Estimate(
                update.before + rate * update.change, update.error, update.weight, server_round
            )
            for reply, update in kept
            if isinstance(update, _Learned)
        }

    def _counted(self, request: Message) -> int:
        known = self._known.get(self.client_of(request.metadata.dst_node_id))
        return 0 if known is None else known.server_round

    def _before(self, reply: Message, base: float, side: int) -> Tensor:
        """The Hᵢ that a client says it started from."""
        if base == 0:
            return torch.zeros(side, side, dtype=self.parameters.dtype)
        known = self._known.get(self.client_of(reply.metadata.src_node_id))
        if known is None or known.server_round != base:
            expected = "none" if known is None else f"that of round {known.server_round}"
            raise ReplyError(f"it starts from a Hessian estimate of round {base:g}; the server has {expected}")
        return known.hessian


def _strategy(config: Config) -> FedNL:
    return FedNL(
        config,
        server_learning_rate=config.server_learning_rate,
        max_factor_side=config.max_factor_side,
        **shared_by_strategies(config),
    )


METHOD = Method(
    client=client,
    strategy=_strategy,
    reads=(
        "server-learning-rate",
        "weight-decay",
        "max-factor-side",
        "fednl-option",
        "hessian-learning-rate",
        "hessian-floor",
        "initial-hessian",
        "compressor",
        "compressor-size",
    ),
)
