"""FedAvg (McMahan et al., AISTATS 2017): local SGD, averaged.

θᵢ ← θᵢ − η gᵢ (K times),      θ⁺ = Σ wᵢ θᵢ,  wᵢ = nᵢ / Σ nⱼ
"""

from ..guarded import Guarded
from ..method import Method, local_training, shared_by_strategies
from ..optimizers import SGD_READS, sgd

METHOD = Method(
    client=local_training(lambda job: sgd(job.config, job.model)),
    strategy=lambda config: Guarded(**shared_by_strategies(config)),
    reads=SGD_READS,
)
