"""FedPM as a Flower strategy: FedAvg whose aggregation is preconditioned mixing."""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from . import messages
from .agreement import Agreement
from .config import KRONECKER_SUMS, check_codec
from .control_variates import (
    CORRECTIONS,
    VARIATE_ROUND,
    Variates,
    as_record,
    read_variate,
    weighted_mean,
)
from .guarded import Guarded
from .mixing import ModelMixer
from .privacy import refuse_differential_privacy
from .replies import Update, read_curvature, with_common_metrics
from .report import PREFIX
from .rewriting import with_extra, without_arrays
from .training import pick_device

_log = logging.getLogger("flwr")


class FedPM(Guarded):
    """Asks clients for their curvature Pᵢ beside their models θᵢ, and mixes the models through it.

    θ⁺ = θ + η_s · (Σ wᵢ Pᵢ)⁻¹ Σ wᵢ Pᵢ (θᵢ − θ)   (arXiv 2511.09100, Eq. 8 in delta form)

    A layer that no client sends curvature for is averaged. A client that sends none for a layer
    counts there as if it had the mean curvature of the others. Replies that cannot be used are left
    out, as ``Guarded`` says.

    Args:
        server_learning_rate: η_s > 0.
        codec: how curvature travels, see ``fedpm_flwr.wire.compression``.
        damping_bounds: replies that name a λ outside of them are left out.
        max_factor_side: replies with a larger matrix are left out.
        kronecker_sum: how two-sided Kronecker products (K-FAC) are mixed. ``exact``: by all clients'
            factors and conjugate gradients; ``factored``: by the mean of the factors, an
            approximation that is cheaper and keeps no client's (``mixing.LayerMixer``).
        max_factor_memory: bytes of these factors to keep in memory; the others go to temporary files.
        correction: of the local gradients, so that the global optimum is a fixed point of many local steps too
            (docs/algorithm.md). ``none``; ``control-variate``: by gᵢ − cᵢ + c with the pair of the
            client's last round; ``fresh``: with that of this round, by one more exchange.
        device: where to mix: ``auto`` (CUDA where there is one, else the CPU), or one that computes in float64.
        state_folder: where the clients' cᵢ are kept during a run; by default the system's temporary folder. Under
            ``Checkpointed`` they are with the checkpoints instead.
        max_payload_bytes: replies with more bytes of curvature are left out unread.
        **strategy: what ``Guarded`` and ``flwr.serverapp.strategy.FedAvg`` take.

    Raises:
        ValueError: naming the argument and what is allowed.
    """

    def __init__(
        self,
        *,
        server_learning_rate: float = 1.0,
        codec: str = "triangle-float32",
        damping_bounds: tuple[float, float] = (0.0, 1e6),
        max_factor_side: int = 8192,
        kronecker_sum: str = "exact",
        max_factor_memory: int = 4 << 30,
        max_payload_bytes: int = 1 << 30,
        correction: str = "none",
        device: str = "auto",
        state_folder: str | None = None,
        **strategy: Any,
    ) -> None:
        super().__init__(**strategy)
        if not (math.isfinite(server_learning_rate) and server_learning_rate > 0):
            raise ValueError(f"server_learning_rate must be a finite number > 0, not {server_learning_rate}")
        if kronecker_sum not in KRONECKER_SUMS:
            raise ValueError(f"unknown kronecker_sum {kronecker_sum!r}; allowed: {', '.join(KRONECKER_SUMS)}")
        if correction not in CORRECTIONS:
            raise ValueError(f"unknown correction {correction!r}; allowed: {', '.join(CORRECTIONS)}")
        low, high = damping_bounds
        if not 0 <= low <= high:
            raise ValueError(f"damping_bounds must be 0 <= low <= high, not {damping_bounds}")
        check_codec(codec)
        self.step_length = server_learning_rate  # of the mixing; Flower's FedAvgM has a server_learning_rate too
        self.codec = codec
        self.damping_bounds = damping_bounds
        self.max_factor_side = max_factor_side
        self.kronecker_sum = kronecker_sum
        self.max_factor_memory = max_factor_memory
        self.max_payload_bytes = max_payload_bytes
        self.correction = correction
        self.device = pick_device(device)
        self.state_folder = None if state_folder is None else Path(state_folder)
        self._variates: Variates | None = None
        self._told_difference = False

    def summary(self) -> None:
        """Log the settings, FedAvg's and then our own."""
        super().summary()
        _log.info("\t└──> Preconditioned mixing:")
        _log.info("\t\t├── Server learning rate: %g", self.step_length)
        _log.info("\t\t├── Weighting: %s", self.weighting)
        _log.info("\t\t├── Correction: %s", self.correction)
        _log.info("\t\t├── Device: %s", self.device)
        _log.info("\t\t└── Codec: %s", self.codec)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send θ as FedAvg does, and ask for curvature.

        Raises:
            ValueError: under one of Flower's wrappers for differential privacy.
        """
        refuse_differential_privacy()
        asking = ConfigRecord({**config, messages.CURVATURE_CODEC: self.codec})
        requests = list(super().configure_train(server_round, arrays, asking, grid))
        if self.correction == "fresh":
            return self._with_fresh_variates(server_round, grid, requests)
        if self.correction == "none":
            return requests
        if self._variates is None or self._variates.run != self.experiment:
            self._variates = self._new_variates()
        return self._variates.requests(requests, self._dtypes(), self.client_of)

    def remembered(self) -> dict[str, Any]:
        """As Guarded, and which of the clients' cᵢ, whose files stay in ``state_folder``, are in c."""
        variates = {} if self._variates is None else dict(self._variates.newest)
        return super().remembered() | {"variates": variates}

    def recall(self, remembered: Mapping[str, Any]) -> None:
        """As Guarded."""
        super().recall(remembered)
        if self.correction == "control-variate":
            self._variates = self._new_variates()
            self._variates.newest = dict(remembered["variates"])

    def combine(
        self, server_round: int, usable: Iterable[tuple[Message, Update]]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Mix the usable replies, in the order in which they are given.

        Raises:
            CurvatureError: there are none, or the mixed model is not finite.
        """
        factored = self.kronecker_sum == "factored"
        mixer = ModelMixer(self._theta, memory=self.max_factor_memory, factored=factored, device=self.device)
        contents: list[RecordDict] = []  # of the replies, without what is large
        agreement, curved = Agreement(), 0
        for reply, update in usable:
            mixer.add(update.state, update.layers, update.weight)
            if self._variates is not None:
                client = self.client_of(reply.metadata.src_node_id)
                self._variates.add(client, server_round, update.extra, update.weight)
            contents.append(without_arrays(reply.content))
            agreement.add(update.layers)
            curved += bool(update.layers)
            del reply, update  # else they are still in memory while the next ones are read
        mixed = ArrayRecord(mixer.result(self.step_length))
        _log.info("aggregate_train: Mixed %d results, %d of them with curvature", len(contents), curved)
        if not curved:
            _log.warning("%sround %d: no reply held curvature; models are averaged", PREFIX, server_round)
        if not self._told_difference and (difference := agreement.difference()):
            self._told_difference = True
            text = "%sround %d: clients differ in the units of their curvature: %s; the larger counts more"
            _log.warning(text, PREFIX, server_round, difference)
        return mixed, self.train_metrics_aggr_fn(with_common_metrics(contents), self.weighted_by_key)

    def accepted(self, server_round: int) -> None:
        """The clients' control variates of this round count."""
        super().accepted(server_round)
        if self._variates is not None:
            self._variates.commit()

    def read(self, reply: Message) -> Update:
        """The checked update in a training reply, with its curvature.

        Raises:
            ReplyError: the reply cannot be used.
        """
        update = super().read(reply)
        layers = read_curvature(
            reply,
            self._theta,
            damping_bounds=self.damping_bounds,
            max_factor_side=self.max_factor_side,
            max_payload_bytes=self.max_payload_bytes,
            device=self.device,
        )
        extra = read_variate(reply, self._shapes()) if self.correction == "control-variate" else {}
        return replace(update, layers=layers, extra=extra)

    def _new_variates(self) -> Variates:
        return Variates(self.experiment, self.state_of)

    def _with_fresh_variates(self, server_round: int, grid: Grid, requests: list[Message]) -> list[Message]:
        """Ask for ∇fᵢ(θ) first; the requests of those that tell it, with c = Σ wᵢ∇fᵢ(θ) of this round."""

        def read(reply: Message) -> tuple[float, dict[str, Tensor]]:
            return self.weight_in(reply), read_variate(reply, self._shapes())

        told = set[int]()

        def gradients() -> Iterator[tuple[float, dict[str, Tensor]]]:
            replies = self.ask(server_round, grid, requests, messages.GRADIENT, {})
            for reply, made in self.usable(server_round, replies, read):
                told.add(reply.metadata.src_node_id)
                yield made

        common = weighted_mean(gradients())
        usable = [request for request in requests if request.metadata.dst_node_id in told]
        record = as_record(common, self._dtypes())
        return [with_extra(request, record, {VARIATE_ROUND: server_round}) for request in usable]

    def _dtypes(self) -> dict[str, torch.dtype]:
        return {key: value.dtype for key, value in self._theta.items()}

    def _shapes(self) -> dict[str, torch.Size]:
        return {key: value.shape for key, value in self._theta.items() if value.is_floating_point()}
