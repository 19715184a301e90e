"""Fed-Sophia: Sophia's local steps, averaged."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord
from torch import Tensor, nn

from fedpm_flwr.algorithms import settings_without_effect
from fedpm_flwr.config import Config
from fedpm_flwr.estimators import GaussNewtonBartlett
from fedpm_flwr.guarded import FailedRoundsError
from fedpm_flwr.rivals.fedsophia import METHOD
from fedpm_flwr.training import derive_seed

from ..apps import federate, ordered
from ..helpers import relative_error
from ..jobs import app_of
from .application import check_learns
from .quadratic import theta_after

CONFIG = Config(learning_rate=0.1, local_steps=1)
BETA_1, BETA_2 = 0.965, 0.99


def two_logits() -> nn.Module:
    """W = 0, [2, 1]."""
    model = nn.Linear(1, 2, bias=False).double()
    nn.init.zeros_(model.weight)
    return model


def one_label_each(partition: int) -> tuple[Tensor, Tensor]:
    """Client 0: x = 1 of label 0; client 1: x = 2 of label 1, three times."""
    x, examples = ((1.0, 1), (2.0, 3))[partition]
    return torch.full((examples, 1), x).double(), torch.full((examples,), partition)


@pytest.mark.parametrize(
    ("weighting", "rounds", "expected"),
    [("num-examples", 1, -0.05), ("num-examples", 2, -0.1), ("uniform", 1, 0.0), ("uniform", 2, 0.0)],
)
def test_rounds_of_clipped_steps_by_hand(weighting: str, rounds: int, expected: float, tmp_path: Path) -> None:
    """γ is so small that every step is η of the gradient's sign: 0.1 · (1, −1) for client 0, its negative for 1.

    Weighed ¼ and ¾ a round moves by 0.05 · (−1, 1), weighed alike by nothing.
    """
    config = replace(CONFIG, sophia_gamma=1e-4, weighting=weighting)
    client = app_of(METHOD, config, tmp_path, data=one_label_each, make_model=two_logits, loss=F.cross_entropy)
    result = federate(client, METHOD.strategy(config), two_logits(), 2, rounds, ordered)
    found = result.arrays.to_torch_state_dict()["weight"]
    torch.testing.assert_close(found, torch.tensor([[expected], [-expected]], dtype=torch.float64))


def test_one_logit_has_no_curvature_and_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(FailedRoundsError):
        theta_after(METHOD, CONFIG, tmp_path, 1)
    assert caplog.text.count("cross-entropy of one output has no curvature") == 2


def test_a_step_with_curvature_by_hand(tmp_path: Path) -> None:
    """Softmax of W x at W = 0: p = (½, ½), so ĝ = ±(½, −½) x whichever label is drawn, and ĝ² = x²/4.

    η = 0.2, γ = 14, β₁ = 0.965, β₂ = 0.99. Client 0, x = 1: g = (−½, ½), m = (−0.0175, 0.0175),
    h = 0.01/4 = 0.0025, γh = 0.035, so W₀ = 0.2 · (½, −½) = (0.1, −0.1). Client 1, x = 2 and three
    examples whose drawn labels may differ: of k times label 0 and 3 − k times label 1 the mean ĝ is
    ±2(2k − 3)/3 · ½ and ĥ = 3 ((2k − 3)/3)², which is 3 if all are equal and 1/3 if not;
    m = 0.035 · (1, −1), γh = 0.14 ĥ, so m/γh = 1/12 or 3/4, and W₁ = −0.2 · that · (1, −1).
    Mean: W = ¼ · 0.1 − ¾ · 0.2 · (1/12 or 3/4) = 0.0125 or −0.0875.
    """
    config = replace(CONFIG, learning_rate=0.2, sophia_gamma=14.0)
    seen = set()
    for seed in range(6):
        seeded = replace(config, seed=seed)
        client = app_of(METHOD, seeded, tmp_path, data=one_label_each, make_model=two_logits, loss=F.cross_entropy)
        result = federate(client, METHOD.strategy(seeded), two_logits(), 2, 1, ordered)
        first, second = (float(w) for w in result.arrays.to_torch_state_dict()["weight"])
        assert first == pytest.approx(-second, abs=1e-14)
        seen.add(round(first, 12))
    assert seen == {0.0125, -0.0875}


def three_classes() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(4, 3).double()


def samples(partition: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(partition)
    x = torch.randn(20, 4, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 3, (20,), generator=generator)


def unclipped(steps: int, config: Config) -> list[Tensor]:
    """θ after so many steps of −η m/(γh), with the estimator's own ĥ of the same seed every other step."""
    model, (x, y) = three_classes(), samples(0)
    parameters = list(model.parameters())
    estimator = GaussNewtonBartlett(model, seed=derive_seed(config.seed, 1, 0))  # of round 1, partition 0
    mean = [torch.zeros_like(p) for p in parameters]
    diagonal = [torch.zeros_like(p) for p in parameters]
    for step in range(steps):
        estimator.recording = estimator.blocks if step % config.refresh_interval == 0 else []
        gradients = torch.autograd.grad(F.cross_entropy(model(x), y), parameters)
        measured = list(estimator.collect().values())
        if measured:
            found = [d.parts()["values"].reshape(p.shape) for d, p in zip(measured, parameters, strict=True)]
            diagonal = [BETA_2 * h + (1 - BETA_2) * new for h, new in zip(diagonal, found, strict=True)]
        mean = [BETA_1 * m + (1 - BETA_1) * g for m, g in zip(mean, gradients, strict=True)]
        with torch.no_grad():
            for p, m, h in zip(parameters, mean, diagonal, strict=True):
                assert (m.abs() < config.sophia_gamma * h).all()
                p.sub_(config.learning_rate / config.sophia_gamma * m / h)
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_with_the_clip_at_infinity_it_is_the_diagonal_step(steps: int, tmp_path: Path) -> None:
    """γ → ∞ with η/γ = 10⁻⁴: θ ← θ − 10⁻⁴ m/h, of one client, to rounding."""
    config = Config(learning_rate=1e5, sophia_gamma=1e9, local_steps=steps, min_available_nodes=1)
    client = app_of(METHOD, config, tmp_path, data=samples, make_model=three_classes, loss=F.cross_entropy)
    state = federate(client, METHOD.strategy(config), three_classes(), 1).arrays.to_torch_state_dict()
    for found, expected in zip(state.values(), unclipped(steps, config), strict=True):
        assert relative_error(found, expected) < 1e-12
    start = ArrayRecord(three_classes().state_dict()).to_torch_state_dict()
    assert relative_error(state["weight"], start["weight"]) > 1e-4


def test_settings_without_effect_are_told() -> None:
    config = Config(algorithm="fedsophia", optimizer="kfac", sophia_gamma=2.0, damping=2.0)
    told = [line.split("=")[0] for line in settings_without_effect(config)]
    assert sorted(told) == ["damping", "optimizer"]


def test_it_learns(tmp_path: Path) -> None:
    check_learns(tmp_path, {"algorithm": "fedsophia", "learning-rate": 0.003})
