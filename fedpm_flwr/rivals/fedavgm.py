"""FedAvgM (Hsu, Qi, Brown 2019, arXiv 1909.06335): FedAvg with momentum on the server, as Flower has it.

    θᵢ ← θᵢ − η gᵢ (K times),      v⁺ = μ_s v + Σ wᵢ (θ − θᵢ),      θ⁺ = θ − η_s v⁺,      wᵢ = nᵢ / Σ nⱼ

v, in the shape of θ, starts at 0; μ_s is the setting ``server-momentum``, η_s ``server-learning-rate``.
With μ_s = 0 and η_s = 1 it is FedAvg. The source has η_s = 1. Buffers are among the arrays of θ, and are
stepped with momentum like the rest.
"""

from flwr.serverapp.strategy import FedAvgM

from ..config import Config
from ..method import Method, local_training, shared_by_strategies
from ..optimizers import SGD_READS, sgd
from .memory import Remembering


class GuardedFedAvgM(Remembering, FedAvgM):
    """Flower's strategy."""

    memory = ("current_arrays", "momentum_vector")


def _strategy(config: Config) -> GuardedFedAvgM:
    return GuardedFedAvgM(
        server_learning_rate=config.server_learning_rate,
        server_momentum=config.server_momentum,
        **shared_by_strategies(config),
    )


METHOD = Method(
    client=local_training(lambda job: sgd(job.config, job.model)),
    strategy=_strategy,
    reads=(*SGD_READS, "server-learning-rate", "server-momentum"),
)
