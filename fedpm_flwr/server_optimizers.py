"""FedPM with a server optimizer: θ − θ⁺, with θ⁺ the mixed model, is the pseudo-gradient of Flower's own.

They are to FedPM what FedAvgM, FedAdam, FedAdagrad and FedYogi are to FedAvg. All else is FedPM's.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi

from .guarded import Guarded
from .replies import Update
from .rivals.memory import Remembering
from .strategy import FedPM

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""How PyTorch names what BatchNorm measures: no parameters, and a variance that was stepped may be negative."""

Aggregate = tuple[ArrayRecord | None, MetricRecord | None]
"""What Flower's ``aggregate_train`` gives."""


class _Mixed(FedAvg):
    """What Flower's strategy finds behind itself, in FedAvg's place, when it asks for the clients' average."""

    mixed: Aggregate = (None, None)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregate:
        """The mixed model."""
        return self.mixed


class _Stepped(Remembering, FedPM):
    """FedPM before a strategy of Flower's that steps by its average, and ``_Mixed`` behind it.

    Args:
        unstepped: names of arrays that are mixed but not stepped, beside BatchNorm's statistics and all that
            is not floating point. The server cannot tell buffers from parameters; a step may take what
            is measured, as an average of squares, where it cannot be.
        **strategy: what ``FedPM`` and Flower's strategy take.
    """

    mixed: Aggregate
    current_arrays: Any

    def __init__(self, *, unstepped: Iterable[str] = (), **strategy: Any) -> None:
        super().__init__(**strategy)
        self.unstepped = frozenset(unstepped)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As FedPM.

        Raises:
            ValueError: ``unstepped`` names an array that the model does not have.
        """
        if unknown := sorted(self.unstepped - set(arrays)):
            raise ValueError(f"unstepped names {unknown[:3]}, which are not among the model's arrays")
        return super().configure_train(server_round, arrays, config, grid)

    def combine(self, server_round: int, usable: Iterable[tuple[Message, Update]]) -> Aggregate:
        """Mix, then let Flower's strategy step what is to be stepped.

        Raises:
            CurvatureError: as FedPM.
            ValueError: the new model is not finite.
        """
        mixed, metrics = super().combine(server_round, usable)
        assert mixed is not None
        state = mixed.to_torch_state_dict()
        names = [key for key, value in state.items() if value.is_floating_point() and not self._is_measured(key)]
        self.mixed = ArrayRecord({key: mixed[key] for key in names}), metrics
        # Flower's θ, a record or a dict, which it goes through side by side with the mixed one.
        self.current_arrays = type(self.current_arrays)({key: self.current_arrays[key] for key in names})
        with np.errstate(invalid="ignore"):  # −∞ − (−∞) of masks, which are as they were
            arrays, metrics = super(Guarded, self).aggregate_train(server_round, [])
        self.mixed = None, None
        assert arrays is not None
        stepped = {
            key: torch.where(torch.isfinite(state[key]), new.to(state[key].dtype), state[key])
            for key, new in arrays.to_torch_state_dict().items()
        }
        return ArrayRecord(state | dict(self._as_sent(ArrayRecord(stepped)).to_torch_state_dict())), metrics

    def _is_measured(self, key: str) -> bool:
        return key in self.unstepped or key.rpartition(".")[2] in _STATISTICS


class FedPMAvgM(_Stepped, FedAvgM, _Mixed):
    """FedPM with momentum: v⁺ = μ v + η_s (Σ wᵢPᵢ)⁻¹ Σ wᵢPᵢ (θᵢ − θ), θ⁺ = θ + v⁺.

    The arguments are ``FedPM``'s, and ``server_momentum``: μ; 0, the default: FedPM itself; and ``unstepped``:
    names of arrays that are mixed but not stepped. Not stepped are BatchNorm's statistics and what is not floating
    point; the server cannot tell other buffers from parameters, and their names are
    ``model.state_dict().keys() - dict(model.named_parameters(remove_duplicate=False)).keys()``.
    """

    memory = ("current_arrays", "momentum_vector")


class FedPMAdam(_Stepped, FedAdam, _Mixed):
    """FedPM with Adam on the server, by Δ = η_s (Σ wᵢPᵢ)⁻¹ Σ wᵢPᵢ (θᵢ − θ), as Flower's FedAdam has it.

    The arguments are ``FedPM``'s, ``eta``, ``beta_1``, ``beta_2`` and ``tau`` as for
    ``flwr.serverapp.strategy.FedAdam``, and ``unstepped`` as for ``FedPMAvgM``.
    """

    memory = ("m_t", "v_t")


class FedPMAdagrad(_Stepped, FedAdagrad, _Mixed):
    """Likewise with Adagrad; the arguments are Flower's, FedPM's, and ``unstepped``."""

    memory = ("m_t", "v_t")


class FedPMYogi(_Stepped, FedYogi, _Mixed):
    """Likewise with Yogi; the arguments are Flower's, FedPM's, and ``unstepped``."""

    memory = ("m_t", "v_t")
