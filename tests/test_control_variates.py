"""Control variates on the server: whose count, and what becomes of files that are lost."""

from pathlib import Path

import pytest
import torch

from fedpm_flwr.control_variates import Variates, weighted_mean
from fedpm_flwr.state import ClientState
from fedpm_flwr.strategy import FedPM


def variates_in(folder: Path) -> Variates:
    return Variates("run", lambda client: ClientState(folder, "run", f"server-{client}"))


def test_the_mean_is_over_every_client_ever_seen_and_each_counts_once(tmp_path: Path) -> None:
    variates = variates_in(tmp_path)
    assert variates.mean() == {}
    for node, value, weight in ((1, 1.0, 1.0), (2, 4.0, 3.0)):
        variates.add(node, 1, {"w": torch.tensor([value])}, weight)
    assert variates.mean() == {}  # nothing counts before the round does
    variates.commit()
    assert float(variates.mean()["w"]) == pytest.approx((1 + 12) / 4)
    variates.add(1, 2, {"w": torch.tensor([5.0])}, 1.0)
    variates.commit()
    assert float(variates.mean()["w"]) == pytest.approx((5 + 12) / 4)
    variates.add(2, 3, {"w": torch.tensor([100.0])}, 3.0)
    variates.requests([], {"w": torch.float32}, int)  # the next round begins: the last one failed
    variates.commit()
    assert float(variates.mean()["w"]) == pytest.approx((5 + 12) / 4)


def test_a_damaged_file_of_the_server_costs_that_client_alone(tmp_path: Path) -> None:
    variates = variates_in(tmp_path)
    for node in (1, 2, 3):
        variates.add(node, 1, {"w": torch.tensor([float(node)])}, 1.0)
    variates.commit()
    (tmp_path / "run" / "server-2" / "1.safetensors").write_bytes(b"")
    variates.add(2, 2, {"w": torch.tensor([8.0])}, 1.0)
    variates.commit()
    assert float(variates.mean()["w"]) == pytest.approx((1 + 3 + 8) / 3)


def test_a_huge_gradient_leaves_no_trace_once_it_is_replaced(tmp_path: Path) -> None:
    variates = variates_in(tmp_path)
    for number, middle in ((1, 2.0), (2, 1e25), (3, 2.0)):
        for node, value in ((1, 1.0), (2, middle), (3, 3.0)):
            variates.add(node, number, {"w": torch.tensor([value], dtype=torch.float64)}, 1.0)
        variates.commit()
    assert variates.mean()["w"].tolist() == [2.0]


def test_a_client_counts_by_its_newest_weight(tmp_path: Path) -> None:
    variates = variates_in(tmp_path)
    for number, weight in ((1, 1.0), (2, 9.0)):
        variates.add(1, number, {"w": torch.tensor([10.0])}, weight)
        variates.add(2, number, {"w": torch.tensor([0.0])}, 1.0)
        variates.commit()
    assert variates.mean()["w"].tolist() == [9.0]


def test_weighted_mean_counts_what_is_missing_as_zero() -> None:
    mean = weighted_mean(
        [(1.0, {"a": torch.tensor(4.0), "b": torch.tensor(2.0)}), (3.0, {"a": torch.tensor(8.0)})]
    )
    assert {key: float(value) for key, value in mean.items()} == {"a": 7.0, "b": 0.5}


def test_an_unknown_correction_is_named() -> None:
    with pytest.raises(ValueError, match="unknown correction 'scaffold'; allowed: none, control-variate, fresh"):
        FedPM(correction="scaffold")
