"""FedPM with a server optimizer: θ − θ⁺, with θ⁺ the mixed model, is the pseudo-gradient of Flower's own.

They are to FedPM what FedAvgM, FedAdam, FedAdagrad and FedYogi are to FedAvg. All else is FedPM's.
"""

from collections.abc import Iterable

from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi

from .guarded import Guarded
from .replies import Update
from .rivals.memory import Remembering
from .strategy import FedPM

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""How PyTorch names what BatchNorm measures: no parameters, and a variance that was stepped may be negative."""

Aggregate = tuple[ArrayRecord | None, MetricRecord | None]


class _Mixed(FedAvg):
    """What Flower's strategy finds behind itself, in FedAvg's place, when it asks for the clients' average."""

    mixed: Aggregate = (None, None)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregate:
        """The mixed model."""
        return self.mixed


class _Stepped(Remembering, FedPM):
    """FedPM before a strategy of Flower's that steps by its average, and ``_Mixed`` behind it."""

    mixed: Aggregate

    def combine(self, server_round: int, usable: Iterable[tuple[Message, Update]]) -> Aggregate:
        """Mix, then let Flower's strategy step; BatchNorm's statistics are mixed alone.

        Raises:
            CurvatureError: as FedPM.
            ValueError: the new model is not finite.
        """
        self.mixed = super().combine(server_round, usable)
        assert self.mixed[0] is not None
        unstepped = self.mixed[0].to_torch_state_dict()
        arrays, metrics = super(Guarded, self).aggregate_train(server_round, [])
        self.mixed = None, None
        assert arrays is not None
        stepped = self._as_sent(arrays).to_torch_state_dict()
        kept = {key: value for key, value in unstepped.items() if key.rpartition(".")[2] in _STATISTICS}
        return ArrayRecord({**stepped, **kept}), metrics


class FedPMAvgM(_Stepped, FedAvgM, _Mixed):
    """FedPM with momentum: v⁺ = μ v + η_s (Σ wᵢPᵢ)⁻¹ Σ wᵢPᵢ (θᵢ − θ), θ⁺ = θ + v⁺.

    Args:
        server_momentum: μ; 0, the default: FedPM itself.
        strategy: what ``FedPM`` takes.
    """

    memory = ("current_arrays", "momentum_vector")


class FedPMAdam(_Stepped, FedAdam, _Mixed):
    """FedPM with Adam on the server, by Δ = η_s (Σ wᵢPᵢ)⁻¹ Σ wᵢPᵢ (θᵢ − θ), as Flower's FedAdam has it.

    Args:
        eta, beta_1, beta_2, tau: as for ``flwr.serverapp.strategy.FedAdam``.
        strategy: what ``FedPM`` takes.
    """

    memory = ("m_t", "v_t")


class FedPMAdagrad(_Stepped, FedAdagrad, _Mixed):
    """Likewise with Adagrad; the arguments are Flower's and FedPM's."""

    memory = ("m_t", "v_t")


class FedPMYogi(_Stepped, FedYogi, _Mixed):
    """Likewise with Yogi; the arguments are Flower's and FedPM's."""

    memory = ("m_t", "v_t")
