"""FedAdam (Reddi et al., ICLR 2021, arXiv 2003.00295): FedAvg with Adam on the server, as Flower has it.

    θᵢ ← θᵢ − η gᵢ (K times),      Δ = Σ wᵢ (θᵢ − θ),  wᵢ = nᵢ / Σ nⱼ
    m⁺ = β₁ m + (1 − β₁) Δ,        v⁺ = β₂ v + (1 − β₂) Δ²
    θ⁺ = θ + η_a √(1 − β₂ᵗ⁺¹) / (1 − β₁ᵗ⁺¹) · m⁺ / (√v⁺ + τ)       in round t = 1, 2, …

m, v and Δ are in the shape of θ, squares and roots of each entry; m and v start at 0. η_a, β₁, β₂ and τ
are the settings ``adam-eta``, ``adam-beta-1``, ``adam-beta-2`` and ``adam-tau``.

Where the source and Flower differ, it is as in Flower: the source starts v at τ² or more and corrects no
bias; Flower corrects it, by exponents that are one ahead of the round. Buffers are among the arrays of θ, and are
stepped like the rest.
"""

from flwr.serverapp.strategy import FedAdam

from ..config import Config
from ..method import Method, local_training, shared_by_strategies
from ..optimizers import SGD_READS, sgd
from .memory import Remembering


class GuardedFedAdam(Remembering, FedAdam):
    """Flower's strategy."""

    memory = ("m_t", "v_t")


def _strategy(config: Config) -> GuardedFedAdam:
    return GuardedFedAdam(
        eta=config.adam_eta,
        eta_l=config.learning_rate,
        beta_1=config.adam_beta_1,
        beta_2=config.adam_beta_2,
        tau=config.adam_tau,
        **shared_by_strategies(config),
    )


METHOD = Method(
    client=local_training(lambda job: sgd(job.config, job.model)),
    strategy=_strategy,
    reads=(*SGD_READS, "adam-eta", "adam-beta-1", "adam-beta-2", "adam-tau"),
)
