"""FedPAC (Liu et al., 2026, arXiv 2602.19271): local second-order steps from a shared P, along a shared direction.

With Θ = {P of each layer}, s = θ⁺ − θ of the last round (0 in the first), K steps of η in a round:

    Θᵢ ← Θ                                                            (alignment: a warm start)
    Θᵢ ← ema·Θᵢ + (1 − ema)·P measured at θᵢ                          (every ``refresh-interval`` steps)
    θᵢ ← θᵢ − η [(1 − β) Pᵢ⁻¹ gᵢ + β Δ],  Δ = −s / (K η)              (correction; K times)
    θ⁺ = Σ wᵢ θᵢ,      Θ⁺ = Σ wᵢ Θᵢ part by part,  wᵢ = nᵢ / Σ nⱼ

θ, gᵢ, s, Δ: [d]. Parts are those of ``Curvature.parts``: FOOF's A, each of K-FAC's two factors, a
diagonal, an exact matrix. A client keeps nothing between rounds. (Not the FedPAC of Xu et al., ICLR 2023, of
personalised classifiers.)

The source was read by its abstract, another's summary of its equations, and parts of the authors' program. From
these: the equations, β = 0.5, Δ = 0 in the first round (whose steps are thus η (1 − β) long). Inferred:

- P is that of the setting ``optimizer``, where the source has SOAP, Sophia and Muon.
- wᵢ as for all methods here; the source counts clients alike.
- A client divides s by the steps K that it takes itself, as the authors' program does: where clients
  take different numbers of steps, the correction moves each by β s in all.
- The warm start counts in the running average as endlessly many measurements (``SecondOrder.warm_start``),
  which is the source's exponential average. Momentum is a client's own, and starts at 0 in each round.
- Momentum, decoupled weight decay and ``clip`` belong to the local update, under the factor 1 − β.
- A layer is averaged over the clients that sent it; where clients send several kinds, the kind of most weight.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from torch import Tensor, nn

from .. import __version__, messages
from ..config import Config, check_codec
from ..curvature import LayerCurvature
from ..method import Job, Method, shared_by_strategies
from ..optim import SecondOrder
from ..replies import Update, read_curvature
from ..report import PREFIX
from ..wire import encode
from .steps import StepTeller

_log = logging.getLogger("flwr")


def correct_updates(
    optimizer: torch.optim.Optimizer, model: nn.Module, step: Mapping[str, Tensor], beta: float, steps: int
) -> None:
    """From now on, d ← (1 − β) d − β s / (K η): s by parameter name, none of it where there is no entry."""
    for group in optimizer.param_groups:
        group["lr"] *= 1 - beta  # plain_lr is kept as a ratio to it
    parts = [(p, step[name] * (beta / steps)) for name, p in model.named_parameters() if name in step]

    @torch.no_grad()
    def after_step(*_: Any) -> None:
        for p, part in parts:
            p.add_(part)

    optimizer.register_step_post_hook(after_step)


def client(job: Job) -> Message:
    """K local steps from the shared P, along the shared direction."""
    optimizer = job.second_order()
    assert isinstance(optimizer, SecondOrder)
    shared = read_curvature(job.request, job.model.state_dict(), max_factor_side=job.config.max_factor_side)
    optimizer.warm_start(shared)
    if job.config.fedpac_beta:
        correct_updates(optimizer, job.model, job.extra(), job.config.fedpac_beta, job.steps)
    job.train(optimizer)
    return job.reply(optimizer)


class FedPAC(StepTeller):
    """Averages the clients' P beside their models, and sends it with the next requests.

    Args:
        align: whether clients are asked for P at all.
        codec: how P travels, up and down.
        max_factor_side: replies with a larger matrix are left out.
        strategy: what ``StepTeller`` takes.
    """

    memory: ClassVar[tuple[str, ...]] = (*StepTeller.memory, "_shared")

    def __init__(
        self,
        *,
        align: bool = True,
        codec: str = "triangle-float32",
        max_factor_side: int = 8192,
        **strategy: Any,
    ) -> None:
        super().__init__(**strategy)
        if not codec.startswith("triangle-"):
            raise ValueError(f"FedPAC averages curvature part by part; allowed: codec=triangle-…, not {codec!r}")
        check_codec(codec)
        self._align, self._codec, self._max_factor_side = align, codec, max_factor_side
        self._shared: ConfigRecord | None = None
        self._next_shared: list[LayerCurvature] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """θ, s and Θ; P is asked for."""
        if server_round == 1:
            self._shared = None
        asking = ConfigRecord({**config, messages.CURVATURE_CODEC: self._codec}) if self._align else config
        requests = list(super().configure_train(server_round, arrays, asking, grid))
        if self._shared is not None:
            for request in requests:
                request.content[messages.CURVATURE] = self._shared
        return requests

    def accepted(self, server_round: int) -> None:
        """Θ⁺ is that of this round, and stays as it was if no reply held P."""
        super().accepted(server_round)
        if self._next_shared:
            payload = encode(self._next_shared, self._codec)
            self._shared = ConfigRecord({messages.PAYLOAD: payload, messages.VERSION: __version__})

    def combine(
        self, server_round: int, usable: Iterable[tuple[Message, Update]]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """θ⁺, and Θ⁺ on the way.

        Raises:
            Exception: as ``StepTeller``.
        """
        mean = MeanPreconditioner()

        def noted() -> Iterator[tuple[Message, Update]]:
            for reply, update in usable:
                mean.add(update.layers, update.weight)
                yield reply, update

        made = super().combine(server_round, noted())
        self._next_shared = mean.result()
        if self._align and not self._next_shared:
            _log.warning("%sround %d: no reply held curvature; the last mean stays", PREFIX, server_round)
        if mean.forms > len(self._next_shared):
            _log.warning(
                "%sround %d: replies hold curvature of several kinds; the one of most weight is averaged",
                PREFIX,
                server_round,
            )
        return made

    def read(self, reply: Message) -> Update:
        """The checked update in a training reply, with its curvature.

        Raises:
            ReplyError: the reply cannot be used.
        """
        update = super().read(reply)
        if not self._align:
            return update
        layers = read_curvature(reply, self._theta, max_factor_side=self._max_factor_side)
        return replace(update, layers=layers)


class MeanPreconditioner:
    """Σ wᵢ Pᵢ / Σ wᵢ of each layer, part by part, in float64, and the like of λ; one client after another."""

    def __init__(self) -> None:
        self._weights: dict[Any, float] = {}
        self._sums: dict[Any, LayerCurvature] = {}
        """By parameters, kind and shapes: wᵢ Pᵢ in sum, in float64; λ likewise."""
        self._dtypes: dict[Any, torch.dtype] = {}

    @property
    def forms(self) -> int:
        """How many layers there are, each counted once for every kind and shape that it came in."""
        return len(self._sums)

    def add(self, layers: Iterable[LayerCurvature], weight: float) -> None:
        """One client's layers, and its w."""
        for layer in layers:
            parts = layer.curvature.parts()
            shapes = tuple((name, *part.shape) for name, part in parts.items())
            form = (layer.block.parameters, layer.curvature.kind, shapes)
            wide = {name: weight * part.double() for name, part in parts.items()}
            damping = weight * layer.damping
            if form in self._sums:
                before = self._sums[form]
                wide = {name: part + wide[name] for name, part in before.curvature.parts().items()}
                damping += before.damping
            self._sums[form] = replace(layer, curvature=layer.curvature.with_parts(wide), damping=damping)
            self._weights[form] = self._weights.get(form, 0.0) + weight
            self._dtypes.setdefault(form, next(iter(parts.values())).dtype)

    def result(self) -> list[LayerCurvature]:
        """The means; of layers that share a parameter, the one of most weight."""
        taken: set[str] = set()
        means = []
        for form in sorted(self._sums, key=lambda form: -self._weights[form]):
            layer, weight, dtype = self._sums[form], self._weights[form], self._dtypes[form]
            keys = {*layer.block.parameters, *(copy for copy, _ in layer.block.copies)}
            if keys & taken:
                continue
            taken |= keys
            mean = {name: (part / weight).to(dtype) for name, part in layer.curvature.parts().items()}
            means.append(
                replace(layer, curvature=layer.curvature.with_parts(mean), damping=layer.damping / weight)
            )
        return means


def _strategy(config: Config) -> FedPAC:
    return FedPAC(
        align=config.fedpac_align,
        codec=config.codec,
        max_factor_side=config.max_factor_side,
        tells=config.fedpac_beta > 0,
        **shared_by_strategies(config),
    )


METHOD = Method(
    client=client,
    strategy=_strategy,
    reads=("codec", "fedpac-align", "fedpac-beta"),
    reads_optimizer=True,
)
