"""``weighting``: how much clients count, by every method."""

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import MetricRecord
from torch import Tensor

from fedpm_flwr.algorithms import get_algorithm
from fedpm_flwr.config import ALGORITHMS

from ..jobs import Examples
from .quadratic import random_rows, train

FEW = [random_rows(0), (random_rows(1)[0][:12], -random_rows(1)[1][:12])]
MANY = [FEW[0], (FEW[1][0].repeat(3, 1), FEW[1][1].repeat(3, 1))]
"""The same losses: the second client has each of its examples three times."""
SETTINGS: dict[str, Any] = {"learning_rate": 0.05, "local_steps": 2, "batch_size": 1000, "damping": 0.5}


def after(algorithm: str, data: list[Examples], folder: Path, **settings: Any) -> tuple[Tensor, MetricRecord]:
    """θ after three rounds, and what was told of training after the first."""
    theta, result = train(get_algorithm(algorithm), data, folder, 3, algorithm=algorithm, **SETTINGS, **settings)
    return theta, result.train_metrics_clientapp[1]


# Fed-Sophia takes no model of one output: its own tests have it.
@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "fedsophia"])
def test_clients_that_weigh_alike_count_as_if_they_had_equally_many_examples(
    algorithm: str, tmp_path: Path
) -> None:
    alike, metrics = after(algorithm, MANY, tmp_path / "a", weighting="uniform")
    equal, _ = after(algorithm, FEW, tmp_path / "b")
    by_examples, metrics_by_examples = after(algorithm, MANY, tmp_path / "c")
    torch.testing.assert_close(alike, equal)
    assert (by_examples - equal).abs().max() > 1e-3
    assert {**metrics} == pytest.approx({**metrics_by_examples}, nan_ok=True)
