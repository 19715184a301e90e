"""FedNew: by hand arithmetic, against Newton; duals that sum to zero, whatever is left out or lost."""

import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from torch import Tensor

from fedpm_flwr import messages
from fedpm_flwr.config import Config
from fedpm_flwr.method import Job
from fedpm_flwr.rivals.fednew import COUNTED, METHOD, VOID

from ..apps import federate, half_squared_error, ordered
from ..jobs import app_of
from ..test_application import run
from .quadratic import BAD, make_linear, optimum, random_rows, rows, spoiling, train

ONE_AND_THREE = [rows([[1.0]], [4.0]), rows([[2.0]], [0.0], times=3)]
"""f₀ = ½(w − 4)² of one example, f₁ = ½(2w)² of three: H = 1 and 4, w₀ = ¼, w₁ = ¾."""
UNEQUAL = [random_rows(seed) for seed in range(4)]


class Watched:
    """What each client kept after each round, and how often its Hessian was measured; as a ``Spoil``."""

    def __init__(self) -> None:
        self.states: dict[int, dict[int, dict[str, Tensor]]] = defaultdict(dict)

    def __call__(self, job: Job, partition: int, reply: Message) -> Message:
        self.states[partition][job.server_round] = job.state.load(job.server_round)
        return reply

    def dual_sum(self, number: int, data: list[tuple[Tensor, Tensor]] = UNEQUAL) -> Tensor:
        """Σ nᵢ λᵢ of a round in which all took part."""
        return torch.stack([len(x) * self.states[i][number]["dual"] for i, (x, _) in enumerate(data)]).sum(0)


def test_two_rounds_by_hand(tmp_path: Path) -> None:
    """α = ρ = 1. Round 1, w = 0: y₀ = −4/(1+2), y₁ = 0; y = ¼·(−4/3) = −1/3, w = 1/3.

    Round 2: λ₀ = −4/3 + 1/3 = −1, λ₁ = 0 + 1/3; g₀ = 1/3 − 4 = −11/3, g₁ = 4/3;
    y₀ = (−11/3 + 1 − 1/3)/3 = −1, y₁ = (4/3 − 1/3 − 1/3)/6 = 1/9; y = −¼ + 1/12 = −1/6, w = 1/2.
    """
    watched = Watched()
    settings: dict[str, Any] = {"damping": 1.0, "fednew_rho": 1.0}
    assert train(METHOD, ONE_AND_THREE, tmp_path, **settings)[0].item() == pytest.approx(1 / 3, rel=1e-14)
    weights, _ = train(METHOD, ONE_AND_THREE, tmp_path, rounds=2, spoil=watched, **settings)
    assert weights.item() == pytest.approx(1 / 2, rel=1e-14)
    assert [watched.states[i][2]["dual"].item() for i in (0, 1)] == pytest.approx([-1, 1 / 3])


def test_one_client_without_damping_is_newtons_step(tmp_path: Path) -> None:
    data = UNEQUAL[1:2]
    weights, _ = train(METHOD, data, tmp_path, damping=0.0, fednew_rho=0.0)
    assert torch.allclose(weights, optimum(data), rtol=1e-10)


def test_one_client_has_no_dual(tmp_path: Path) -> None:
    watched = Watched()
    train(METHOD, UNEQUAL[:1], tmp_path, rounds=3, spoil=watched)
    assert [state["dual"].abs().max().item() for state in watched.states[0].values()] == [0.0] * 3


def test_duals_sum_to_zero(tmp_path: Path) -> None:
    watched = Watched()
    train(METHOD, UNEQUAL, tmp_path, rounds=5, spoil=watched)
    assert watched.dual_sum(5).abs().max() < 1e-10
    assert min(watched.states[i][5]["dual"].abs().max() for i in range(4)) > 1e-2


def test_it_ends_at_the_optimum_of_all_and_duals_at_the_gradients(tmp_path: Path) -> None:
    watched = Watched()
    weights, _ = train(METHOD, UNEQUAL, tmp_path, rounds=30, spoil=watched, fednew_rho=1.0)
    assert torch.allclose(weights, optimum(UNEQUAL), rtol=1e-4)
    for i, (x, y) in enumerate(UNEQUAL):
        gradient = x.T @ (x @ weights - y[:, 0]) / len(x)
        assert torch.allclose(watched.states[i][30]["dual"], gradient, atol=1e-4)


def test_it_ends_there_with_partial_participation_too(tmp_path: Path) -> None:
    """By the duals: averaged directions of changing halves would go on wandering."""
    weights, _ = train(METHOD, UNEQUAL, tmp_path, rounds=50, fraction_train=0.5, fednew_rho=3.0)
    assert torch.allclose(weights, optimum(UNEQUAL), rtol=1e-3)


@pytest.mark.parametrize(
    ("refresh", "expected"), [(0, [1] * 5), (1, None), (2, [1, 1, 3, 3, 5]), (3, [1, 1, 1, 4, 4])]
)
def test_the_hessian_is_measured_so_often(refresh: int, expected: list[int] | None, tmp_path: Path) -> None:
    watched = Watched()
    train(METHOD, UNEQUAL[:2], tmp_path, rounds=5, spoil=watched, fednew_refresh=refresh)
    states = watched.states[1].values()
    if expected is None:  # always new: there is none to keep
        assert all("hessian" not in state for state in states)
    else:
        assert [int(state["measured"]) for state in states] == expected


def test_a_kept_hessian_is_used(tmp_path: Path) -> None:
    """α = 1, ρ = 0, one client, f = ½(w − 4)²: y = (w − 4)/2; a Hessian changed on disk to 3 gives (w − 4)/4."""

    def swap(job: Job, partition: int, reply: Message) -> Message:
        state = job.state.load()
        job.state.save(job.server_round, {**state, "hessian": torch.full_like(state["hessian"], 3.0)})
        return reply

    settings: dict[str, Any] = {"damping": 1.0, "fednew_rho": 0.0, "fednew_refresh": 0}
    weights, _ = train(METHOD, ONE_AND_THREE[:1], tmp_path, rounds=2, spoil=swap, **settings)
    assert weights.item() == pytest.approx(2 + 2 / 4)


@pytest.mark.parametrize("kind", range(BAD))
def test_a_bad_reply_is_left_out_and_changes_no_dual(
    kind: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Client 1's reply of round 2 is not counted: what it applies in round 3 is still due from round 1."""
    watched, said = Watched(), list[str]()
    bad = spoiling("direction", kind, lambda job, partition: (job.server_round, partition) == (2, 1), said)
    train(METHOD, UNEQUAL, tmp_path, rounds=3, spoil=lambda job, i, reply: bad(job, i, watched(job, i, reply)))
    (line,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert "(partition 1)" in line
    assert said[0] in line
    assert watched.dual_sum(3).abs().max() < 1e-10
    assert torch.equal(watched.states[1][3]["dual"], watched.states[1][2]["dual"])


def test_a_failed_round_changes_no_dual(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    watched = Watched()
    bad = spoiling("direction", 1, lambda job, partition: job.server_round == 2 and partition > 0, [])

    def spoil(job: Job, partition: int, reply: Message) -> Message | None:
        return bad(job, partition, watched(job, partition, reply))

    weights, _ = train(METHOD, UNEQUAL, tmp_path, rounds=3, spoil=spoil, min_replies=2)
    assert "1 usable replies, but min-replies is 2" in caplog.text
    assert all(torch.equal(states[3]["dual"], states[2]["dual"]) for states in watched.states.values())
    assert torch.allclose(weights, train(METHOD, UNEQUAL, tmp_path, rounds=2)[0], rtol=1e-12)


def test_a_lost_state_is_survived_and_all_duals_start_anew(tmp_path: Path) -> None:
    """Client 1's disk is emptied after round 3; it says so in round 4, and in round 5 all duals are 0."""
    watched, told = Watched(), list[tuple[str | None, str | None]]()

    def lose(job: Job, partition: int, reply: Message) -> Message:
        watched(job, partition, reply)
        if partition == 1:
            told.append((messages.asked(job.request, COUNTED), messages.asked(job.request, VOID)))
            if job.server_round == 3:
                shutil.rmtree(job.state._folder)
        return reply

    weights, result = train(METHOD, UNEQUAL, tmp_path, rounds=30, spoil=lose, fednew_refresh=0, fednew_rho=1.0)
    assert told[:6] == [("0", "0"), ("1", "0"), ("2", "0"), ("3", "0"), ("4", "4"), ("5", "4")]
    lost = [metrics["lost-duals"] for metrics in result.train_metrics_clientapp.values()]
    assert [number for number, share in enumerate(lost, start=1) if share] == [4]
    assert watched.dual_sum(4).abs().max() > 1e-3
    assert all(watched.states[i][5]["dual"].abs().max() == 0 for i in range(4))
    assert [int(watched.states[i][5]["measured"]) for i in range(4)] == [1, 4, 1, 1]
    assert watched.dual_sum(30).abs().max() < 1e-9
    assert torch.allclose(weights, optimum(UNEQUAL), rtol=1e-3)


def test_a_second_run_of_a_strategy_starts_anew(tmp_path: Path) -> None:
    config = Config(dtype="float64")
    app, strategy, model = (
        app_of(
            METHOD,
            config,
            tmp_path,
            data=UNEQUAL.__getitem__,
            make_model=make_linear(0.0, 0.0),
            loss=half_squared_error,
        ),
        METHOD.strategy(config),
        make_linear(0.0, 0.0)(),
    )
    first, second = (federate(app, strategy, model, 4, rounds=3, wrap=ordered) for _ in range(2))
    assert torch.equal(*(result.arrays.to_torch_state_dict()["weight"] for result in (first, second)))


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_it_learns_in_the_application(share: float, tmp_path: Path) -> None:
    settings = {"algorithm": "fednew", "model": "linear", "alpha": 10.0, "fraction-train": share}
    settings |= {"state-folder": str(tmp_path / "state"), "fednew-refresh": 2, "batch-size": 0}
    table = run(tmp_path / "run", {**settings, "num-server-rounds": 3}, nodes=4)
    assert [row["clients"] for row in table] == [0, *[4 * share] * 3]
    assert table[-1]["test-loss"] < table[0]["test-loss"] / 2
    assert len(list((tmp_path / "state").glob("*/*"))) >= 4 * share
