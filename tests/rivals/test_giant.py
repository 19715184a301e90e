"""GIANT: three exchanges a round, by hand arithmetic, against Newton, with bad replies."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedpm_flwr.messages import GRADIENT
from fedpm_flwr.method import Job
from fedpm_flwr.rivals.giant import ARMIJO, LINE_SEARCH, METHOD, VALUES, armijo

from ..test_application import run
from .quadratic import BAD, optimum, random_rows, rows, spoiling, train

ONE_AND_THREE = [rows([[1.0]], [4.0]), rows([[2.0]], [0.0], times=3)]
"""f₀ = ½(w − 4)² of one example, f₁ = ½(2w)² of three: H = 1 and 4, w₀ = ¼, w₁ = ¾."""
STEEP = [rows([[1.0]], [4.0]), rows([[3.0]], [0.0])]
"""f₀ = ½(w − 4)², f₁ = ½(3w)², one example each."""


def test_two_rounds_by_hand(tmp_path: Path) -> None:
    """At w = 0: g = ¼(−4) + ¾·0 = −1, p = −1·(¼/1 + ¾/4) = −7/16.

    f(0) = ¼·8 = 2; f(7/16) = ⅛(57/16)² + 1.5(7/16)² = 1.87 < 2: a = 1, w = 7/16.
    g = ¼(7/16 − 4) + 3·7/16 = 27/64, p = 27/64 · 7/16 = 189/1024; along p, f falls by
    p²(16/7 − 13/8) > 0: a = 1, w = 448/1024 − 189/1024 = 259/1024.
    """
    assert train(METHOD, ONE_AND_THREE, tmp_path)[0].item() == pytest.approx(7 / 16, rel=1e-14)
    assert train(METHOD, ONE_AND_THREE, tmp_path, rounds=2)[0].item() == pytest.approx(259 / 1024, rel=1e-14)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 5 / 9),
        ({"line_search_steps": 0}, 10 / 9),
        ({"line_search_steps": 0, "server_learning_rate": 0.25}, 5 / 18),
        ({"line_search_steps": 1}, 0.0),
        ({"line_search_steps": 2}, 5 / 9),
    ],
)
def test_the_line_search_by_hand(settings: dict[str, Any], expected: float, tmp_path: Path) -> None:
    """At w = 0: g = ½(−4) = −2, p = −2·½(1 + 1/9) = −10/9, and the sum's Hessian is 5.

    f(a) − f(0) = −a·20/9 + ½·5·a²·100/81: 0.86 > 0 at a = 1, −0.34 at a = ½. So w = ½·10/9; or with
    a = 1 alone the best is a = 0; or without a search a is the server's learning rate.
    """
    assert train(METHOD, STEEP, tmp_path, **settings)[0].item() == pytest.approx(expected, rel=1e-14, abs=1e-15)


def test_armijo_takes_the_largest_length_that_falls_enough() -> None:
    """With a slope of 1 the condition at a = 1 is f ≤ f(0) − 10⁻⁴: met, missed, missed by all."""
    lengths = [0.0, 1.0, 0.5, 0.25]
    assert armijo(lengths, [1.0, 1 - 1.01 * ARMIJO, 0.2, 0.1], 1.0) == 1.0
    assert armijo(lengths, [1.0, 1 - 0.99 * ARMIJO, 0.2, 0.1], 1.0) == 0.5
    assert armijo(lengths, [1.0, 1.0, 1 - 0.4 * ARMIJO, 1.0], 1.0) == 0.5  # the least, though not enough
    assert armijo(lengths, [1.0, 2.0, 2.0, 2.0], 1.0) == 0.0


def test_one_client_is_newtons_step(tmp_path: Path) -> None:
    data = [random_rows(1)]
    assert torch.allclose(train(METHOD, data, tmp_path)[0], optimum(data), rtol=1e-10)


def test_identical_clients_are_newtons_step(tmp_path: Path) -> None:
    assert torch.allclose(train(METHOD, [random_rows(1)] * 3, tmp_path)[0], optimum([random_rows(1)]), rtol=1e-10)


def test_equal_hessians_are_newtons_step_of_the_sum(tmp_path: Path) -> None:
    """Same inputs, other targets: ∇²fᵢ are equal, the minima are not."""
    x, y = random_rows(1)
    data = [(x, y), (x, y * -3 + 1), (torch.cat([x, x]), torch.cat([y, y]) + 5)]
    assert torch.allclose(train(METHOD, data, tmp_path)[0], optimum(data), rtol=1e-10)


def test_different_hessians_are_not(tmp_path: Path) -> None:
    data = [random_rows(0), random_rows(2)]
    assert not torch.allclose(train(METHOD, data, tmp_path)[0], optimum(data), rtol=1e-3)


def test_rounds_end_at_the_optimum_of_all(tmp_path: Path) -> None:
    data = [random_rows(seed) for seed in range(3)]
    assert torch.allclose(train(METHOD, data, tmp_path, rounds=9)[0], optimum(data), rtol=1e-4)


def test_a_singular_hessian_is_damped(tmp_path: Path) -> None:
    """f = ½(w₁ + w₂ − 2)²: H = [[1, 1], [1, 1]], g = (−2, −2), (H + ½I)⁻¹g = −2/(2 + ½)·(1, 1)."""
    weights, result = train(METHOD, [rows([[1.0, 1.0]], [2.0])], tmp_path, damping=0.5)
    assert weights.tolist() == pytest.approx([0.8, 0.8])
    assert result.train_metrics_clientapp[1]["damping"] == 0.5


def test_weight_decay_is_part_of_f(tmp_path: Path) -> None:
    """½(w − 4)² + ½·3·w² is least at w = 4/(1 + 3) = 1."""
    assert train(METHOD, ONE_AND_THREE[:1], tmp_path, weight_decay=3.0)[0].item() == pytest.approx(1.0)


@pytest.mark.parametrize("kind", range(BAD))
@pytest.mark.parametrize(("phase", "name"), [(GRADIENT, GRADIENT), ("train", "direction"), (LINE_SEARCH, VALUES)])
def test_bad_replies_are_left_out(
    phase: str, name: str, kind: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Client 1 of three is left out of one exchange, and is no longer asked in those after it."""
    asked: list[tuple[str, int]] = []
    said: list[str] = []

    def which(job: Job, partition: int) -> bool:
        asked.append((job.phase, partition))
        return job.phase == phase and partition == 1

    data = [random_rows(0), random_rows(1), random_rows(2)]
    weights, _ = train(METHOD, data, tmp_path, spoil=spoiling(name, kind, which, said))
    left_out = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(left_out) == 1
    assert "(partition 1)" in left_out[0]
    assert said[0] in left_out[0]
    phases = [GRADIENT, "train", LINE_SEARCH]
    later = phases[phases.index(phase) + 1 :]
    assert {one for one, partition in asked if partition == 1} == {*phases} - {*later}
    assert {one for one, partition in asked if partition == 2} == {*phases}
    assert torch.allclose(weights, _without_the_second(data, phase), rtol=1e-10)


def _without_the_second(data: list[tuple[Tensor, Tensor]], phase: str) -> Tensor:
    """w = −p after a round in which client 1 of three gives no gradient, no direction, or only no values."""
    every, others = (0, 1, 2), (0, 2)
    by_gradient, by_direction = others if phase == GRADIENT else every, every if phase == LINE_SEARCH else others

    def mean(of: tuple[int, ...], vectors: list[Tensor]) -> Tensor:
        examples = torch.tensor([float(len(data[i][0])) for i in of], dtype=torch.float64)
        return torch.stack([vectors[i] for i in of]).T @ (examples / examples.sum())

    gradient = mean(by_gradient, [-(x.T @ y)[:, 0] / len(x) for x, y in data])
    return -mean(by_direction, [torch.linalg.solve(x.T @ x / len(x), gradient) for x, _ in data])


@pytest.mark.parametrize("phase", [GRADIENT, "train", LINE_SEARCH])
def test_a_round_without_any_usable_reply_leaves_the_model(
    phase: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = {"train": "direction", LINE_SEARCH: VALUES}.get(phase, GRADIENT)
    spoil = spoiling(name, 1, lambda job, partition: job.phase == phase and job.server_round == 1, [])
    weights, _ = train(METHOD, ONE_AND_THREE, tmp_path, rounds=2, spoil=spoil)
    assert "the model stays as it was" in caplog.text
    assert weights.item() == pytest.approx(7 / 16)  # as after one round


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_it_learns_in_the_application(share: float, tmp_path: Path) -> None:
    settings = {"algorithm": "giant", "model": "linear", "alpha": 10.0, "fraction-train": share, "batch-size": 0}
    table = run(tmp_path, {**settings, "num-server-rounds": 3}, nodes=4)
    assert [row["clients"] for row in table] == [0, *[4 * share] * 3]
    assert table[-1]["test-loss"] < table[0]["test-loss"] / 2


def test_a_model_too_large_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"algorithm": "giant", "model": "linear", "max-factor-side": 600, "num-server-rounds": 1}
    with pytest.raises(RuntimeError, match="no round gave a new model"):
        run(tmp_path, settings)
    assert "an exact matrix of 650 parameters, more than 600: take a smaller model" in caplog.text
