"""FedNS (Li, Liu, Wang, Wu and Wang, AAAI 2024, arXiv 2401.02734): Newton's method by sketched roots of Hessians.

Client i sends ∇fᵢ(θ), [d], and Sᵢ Aᵢ, [s, d], where Aᵢ [mᵢ, d] is a root of the Hessian of its mean loss
without weight decay, AᵢᵀAᵢ = ∇²fᵢ(θ) − ωI, and Sᵢ [s, mᵢ] a random sketch, E[SᵢᵀSᵢ] = I (``sketches``), drawn
anew in each round. The server steps by

    H = Σ wᵢ (Sᵢ Aᵢ)ᵀ(Sᵢ Aᵢ) + (ω + λ) I,      θ⁺ = θ − η_s H⁻¹ Σ wᵢ ∇fᵢ(θ),      wᵢ = nᵢ / Σ nⱼ

over the clients that take part. With s ≥ mᵢ, Aᵢ itself is sent, which is shorter and exact.

Settings: η_s ``server-learning-rate`` (the source's μ), ω ``weight-decay`` (its λ), s ``sketch-size``, S
``sketch``, λ ``damping``. The source has λ = 0 and ω > 0; λ is for ω = 0, where H may be singular: it lengthens
no gradient, so the optimum stays.

Inferred: the source's Aᵢ is of generalised linear models, diag(√ℓ″) X/√nᵢ. Here Aᵢ is the root of the
Gauss-Newton matrix, for each example the root of the loss's Hessian by the model's outputs, Bᵀ [C, C], times
their derivatives by θ, [C, d], over √nᵢ; rows of zeros are left out. For ``linear`` and ``logistic`` models that
is exact, and for ``logistic`` it is the source's Aᵢ with mᵢ = nᵢ; for softmax of C classes mᵢ = (C − 1) nᵢ.
The authors' program sketches a root [d, d] of the Hessian instead, ω in it: longer to compute, of the same
use. Partial participation is not in the source: here H and the gradient are those of the participants.
No client keeps anything.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import Message
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vjp, vmap

from ..config import Config
from ..curvature import to_matrix
from ..curvature.linalg import add_to_diagonal, cholesky_solve
from ..messages import GRADIENT
from ..method import Job, Method, shared_by_strategies
from ..replies import ReplyError, Update, read_tensors
from ..training import Batches, Loss, on_device
from .server_step import ServerStep, Slope, mean_gradient
from .sketches import SKETCHES
from .vectors import check_side, check_whole

ROOT = "root"
"""In a reply: Sᵢ Aᵢ, or Aᵢ."""
_EXAMPLES_AT_A_TIME = 256


def gauss_newton_root(model: nn.Module, batches: Batches, loss: Loss, device: torch.device | str) -> Tensor:
    """A [m, d] with AᵀA the Gauss-Newton matrix of the mean loss over these examples, convex by the outputs.

    ``loss`` is the mean over a batch. In ``Objective``'s order of parameters; in the model's mode.
    """
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def of_example(x: Tensor, y: Tensor) -> Tensor:
        def outputs(values: dict[str, Tensor]) -> Tensor:
            made: Tensor = functional_call(model, values, (x[None],))
            return made[0]

        z, pull = vjp(outputs, parameters)[:2]
        curved = jacrev(jacrev(lambda z: loss(z[None], y[None])))(z).reshape(z.numel(), z.numel())
        values, vectors = torch.linalg.eigh(curved)
        # What is 0 but for rounding, as one of softmax's eigenvalues is, makes rows of exact zeros.
        # The 1: softmax's p − p² is off by ε, however small it is.
        least = values[-1].clamp(min=1) * z.numel() * torch.finfo(values.dtype).eps
        root = vectors * torch.where(values > least, values, 0).sqrt()
        (rows,) = vmap(pull)(root.T.reshape(-1, *z.shape))
        return vmap(lambda *row: to_matrix(row).flatten())(*rows.values())

    parts, examples = [], 0
    for batch in batches:
        inputs, targets = on_device(model, *batch, device)
        rows = vmap(of_example, chunk_size=_EXAMPLES_AT_A_TIME)(inputs, targets).flatten(0, 1)
        parts.append(rows[rows.any(dim=1)])
        examples += len(inputs)
    return torch.cat(parts) / math.sqrt(examples)


def client(job: Job) -> Message:
    """Send the gradient, and the sketched root of the Hessian."""
    objective = job.objective
    check_side(len(objective.theta), job.config.max_factor_side)
    check_whole(job.model, len(objective.theta))
    job.model.eval()  # as the objective: nothing is drawn at random, no running statistics change
    root = gauss_newton_root(job.model, job.whole, job.loss, job.device)
    if len(root) > job.config.sketch_size:
        generator = torch.Generator().manual_seed(job.seed)
        root = SKETCHES[job.config.sketch](root, job.config.sketch_size, generator)
    job.metrics["train-loss"] = objective.value()
    return job.reply(extra={GRADIENT: objective.gradient(), ROOT: root})


@dataclass(frozen=True, eq=False)
class _Sketched(Slope):
    """A checked reply."""

    root: Tensor
    """SᵢAᵢ, [≤ s, d]."""


class FedNS(ServerStep):
    """Newton's steps by clients' sketched roots of Hessians.

    Args:
        sketch_size: s; replies with more rows are left out.
        shift: ω + λ.
        strategy: what ``ServerStep`` takes.
    """

    def __init__(self, *, sketch_size: int, shift: float, **strategy: Any) -> None:
        super().__init__(**strategy)
        self.sketch_size = sketch_size
        self.shift = shift

    def read(self, reply: Message) -> Update:
        """The checked gradient and sketch in a reply.

        Raises:
            ReplyError: the reply cannot be used.
        """
        update, theta = super().read(reply), self.parameters
        root = read_tensors(reply.content).get(ROOT, torch.zeros(()))
        rows = len(root) if root.ndim else 0
        if rows > self.sketch_size:
            raise ReplyError(f"its sketch has {rows} rows, more than sketch-size={self.sketch_size}")
        shapes = {GRADIENT: (len(theta),), ROOT: (rows, len(theta))}
        tensors = {key: value.to(theta) for key, value in read_tensors(reply.content, shapes).items()}
        return _Sketched(update.state, [], update.weight, tensors[GRADIENT], tensors[ROOT])

    def direction(self, server_round: int, kept: Sequence[tuple[Message, Update]]) -> Tensor:
        """H⁻¹ g.

        Raises:
            CurvatureError: H is not positive definite.
        """
        gradient = mean_gradient(kept)
        total = sum(update.weight for _, update in kept)
        hessian = gradient.new_zeros(len(gradient), len(gradient))
        for _, update in kept:
            if isinstance(update, _Sketched):
                hessian += update.root.T @ update.root * (update.weight / total)
        return cholesky_solve(add_to_diagonal(hessian, self.shift), gradient[:, None])[:, 0]


def _strategy(config: Config) -> FedNS:
    return FedNS(
        sketch_size=config.sketch_size,
        shift=config.weight_decay + config.damping,
        server_learning_rate=config.server_learning_rate,
        max_factor_side=config.max_factor_side,
        **shared_by_strategies(config),
    )


METHOD = Method(
    client=client,
    strategy=_strategy,
    reads=("server-learning-rate", "weight-decay", "damping", "max-factor-side", "sketch", "sketch-size"),
)
