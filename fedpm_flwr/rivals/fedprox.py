"""FedProx (Li et al., MLSys 2020, arXiv 1812.06127): FedAvg with local steps that are held near θ.

    θᵢ ← θᵢ − η (gᵢ + μ_p (θᵢ − θ)) (K times),      θ⁺ = Σ wᵢ θᵢ,  wᵢ = nᵢ / Σ nⱼ

so gᵢ is that of fᵢ(ϑ) + μ_p/2 ‖ϑ − θ‖²: μ_p is the setting ``proximal-mu``, which Flower's strategy sends to
the clients. With μ_p = 0 it is FedAvg.

Inferred: all clients take the same passes over their data; the source also lets slow ones take fewer, and
samples clients by their numbers of examples and averages them uniformly, where Flower samples uniformly
and weighs.
"""

import torch
from flwr.serverapp.strategy import FedProx

from .. import messages
from ..config import Config
from ..guarded import Guarded
from ..method import Job, Method, local_training, shared_by_strategies
from ..optim.correction import correct_gradients
from ..optimizers import SGD_READS, sgd

_MU = "proximal-mu"
"""In the request's config, where Flower's strategy puts it."""


class GuardedFedProx(Guarded, FedProx):
    """Flower's strategy."""


def _optimizer(job: Job) -> torch.optim.Optimizer:
    """SGD on the loss with the proximal term, whose weight the request names; where it names none: 0."""
    optimizer = sgd(job.config, job.model)
    mu = float(messages.asked(job.request, _MU) or 0.0)
    theta = {p: p.detach().clone() for p in job.model.parameters()}
    correct_gradients(optimizer, lambda p: mu * (p.detach() - theta[p]))
    return optimizer


def _strategy(config: Config) -> GuardedFedProx:
    return GuardedFedProx(proximal_mu=config.proximal_mu, **shared_by_strategies(config))


METHOD = Method(client=local_training(_optimizer), strategy=_strategy, reads=(*SGD_READS, _MU))
