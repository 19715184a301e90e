"""LocalNewton (Gupta et al., 2021, arXiv 2105.07320): local second-order steps, averaged.

    θᵢ ← θᵢ − η Pᵢ⁻¹ gᵢ (K times),      θ⁺ = Σ wᵢ θᵢ,  wᵢ = nᵢ / Σ nⱼ

P is that of the setting ``optimizer``, where the source has the Hessian and a line search.
"""

from ..guarded import Guarded
from ..method import Job, Method, local_training, shared_by_strategies
from ..optimizers import OPTIMIZERS

METHOD = Method(
    client=local_training(Job.second_order),
    strategy=lambda config: Guarded(**shared_by_strategies(config)),
    reads_optimizer=True,
)


def with_optimizer(name: str) -> Method:
    """LocalNewton whose P is always that of the optimizer of this name."""
    return Method(
        client=local_training(lambda job: job.second_order(name)),
        strategy=METHOD.strategy,
        reads=tuple(key for key in OPTIMIZERS[name].reads if key != "optimizer"),
    )
