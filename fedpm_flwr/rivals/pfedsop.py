"""pFedSOP (Sen and Mohan, 2025, arXiv 2506.07159): a model of each client's own, moved by a rank-one Newton step.

Client i keeps x (its personalised model) and Δᵢ (its last local update); Δ is the mean of the last round's. All
are [d].

    φ = arccos(ΔᵢᵀΔ / (‖Δᵢ‖ ‖Δ‖)),   b = 1 − exp(−exp(−λ_G (φ − 1))),   v = (1 − b) Δᵢ + b Δ
    x ← x − η₁ (v vᵀ + ρI)⁻¹ v = x − η₁ v / (ρ + vᵀv)                     (Sherman and Morrison)
    y = x after K steps of SGD, of length η;   Δᵢ ← (x − y) / η            (sent up)
    Δ⁺ = Σ wᵢ Δᵢ,  wᵢ = nᵢ / Σ nⱼ;      θ⁺ = θ − η_s η Δ⁺

η₁: ``personal-learning-rate``, λ_G: ``personal-sharpness``, ρ: ``damping``, η: ``learning-rate``,
η_s: ``server-learning-rate``. Clients of about the same direction (φ small) take Δ (b ≈ 1); where they
differ (φ > 1 radian) each keeps to its own. A reply's model is θ − η Δᵢ, so that its mean is θ⁺.

The source was read by its abstract and by others' summaries of its equations. From these: φ, b, v, the Newton
step, Δᵢ, and Δ, which counts clients alike where here they count by examples. Inferred:

- There is no global model in the source; θ is one that moves by what the clients send. It starts where they do.
- What a client keeps of a round is x as the Newton step left it; y serves to measure Δᵢ.
- Without a state (a client's first round, or a state that is lost) or without a Δ (the first round) there
  is no Newton step. A client without a state starts from θ, which has all Δ so far in it.
- φ is π/2 where Δᵢ or Δ is 0. η₁ and λ_G have defaults of our own.
- ``personal-accuracy`` and ``personal-loss`` are those of x on the client's own training examples.
"""

import math

import torch
from flwr.app import Message
from torch import Tensor

from ..config import Config
from ..curvature import to_matrix
from ..method import Job, Method, shared_by_strategies
from ..optimizers import SGD_READS, sgd
from ..training import evaluate
from .steps import StepTeller

_MODEL, _UPDATE = "model.", "update"


_LARGEST_EXPONENT = 700.0
"""Beyond it exp is no float64."""


def collaboration(own: Tensor, shared: Tensor, sharpness: float) -> float:
    """b of two updates [d], by the Gompertz function of the angle between them."""
    norms = float(own.norm() * shared.norm())
    cosine = float(own @ shared) / norms if norms else 0.0
    angle = math.acos(min(max(cosine, -1.0), 1.0))
    return 1 - math.exp(-math.exp(min(-sharpness * (angle - 1), _LARGEST_EXPONENT)))


def rank_one_newton(update: Tensor, damping: float) -> Tensor:
    """(v vᵀ + ρI)⁻¹ v = v / (ρ + vᵀv), [d]; 0 where v is, ρ = 0 or not."""
    return update / (damping + update @ update).clamp(min=torch.finfo(update.dtype).tiny)


def client(job: Job) -> Message:
    """The Newton step of x, and the SGD steps that measure Δᵢ."""
    objective, config = job.objective, job.config
    theta, kept, told = objective.theta, job.newest_state(), job.extra()
    if kept:
        _load(job, kept)
    x = objective.theta
    if kept and told:
        shared = -_vector(job, told) / config.learning_rate
        own = kept[_UPDATE].to(x)
        b = collaboration(own, shared, config.personal_sharpness)
        x = x - config.personal_learning_rate * rank_one_newton((1 - b) * own + b * shared, config.damping)
        objective.move_to(x)
    if job.train(sgd(config, job.model)):
        drift = objective.theta - x
        objective.move_to(x)
        own_state = {_MODEL + key: value for key, value in job.model.state_dict().items()}
        job.keep({**own_state, _UPDATE: -drift / config.learning_rate})
        job.metrics |= _measured(job)
        objective.move_to(theta + drift)
    return job.reply()


def evaluate_personal(job: Job) -> dict[str, float]:
    """Loss and accuracy of x; of θ for a client that has none yet."""
    kept = job.newest_state()
    if kept:
        _load(job, kept)
    return _measured(job)


def _measured(job: Job) -> dict[str, float]:
    loss, accuracy = evaluate(job.model, job.whole, job.loss, job.device)
    return {"personal-loss": loss, "personal-accuracy": accuracy}


def _load(job: Job, kept: dict[str, Tensor]) -> None:
    job.model.load_state_dict(
        {key.removeprefix(_MODEL): value for key, value in kept.items() if key.startswith(_MODEL)}
    )


def _vector(job: Job, tensors: dict[str, Tensor]) -> Tensor:
    """Tensors by parameter name as one vector [d], as ``Objective`` has them."""
    names = [name for name, p in job.model.named_parameters() if p.requires_grad]
    return to_matrix([tensors[name] for name in names]).flatten()


def _strategy(config: Config) -> StepTeller:
    return StepTeller(server_learning_rate=config.server_learning_rate, **shared_by_strategies(config))


METHOD = Method(
    client=client,
    strategy=_strategy,
    evaluate=evaluate_personal,
    reads=(*SGD_READS, "damping", "server-learning-rate", "personal-learning-rate", "personal-sharpness"),
)
