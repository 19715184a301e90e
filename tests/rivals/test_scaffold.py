"""SCAFFOLD: control variates kept by the clients, and a server whose c is always their mean."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message
from torch import Tensor

import client_app
from fedpm_flwr import messages
from fedpm_flwr.config import Config
from fedpm_flwr.method import Job
from fedpm_flwr.rivals import fedavg
from fedpm_flwr.rivals.scaffold import METHOD

from .application import check_learns, digits
from .quadratic import BROKEN, broken_arrays, check_left_out, theta_after, two_quadratics

CONFIG = Config(learning_rate=0.1, local_steps=2, weighting="uniform")
OPTIMUM = {"uniform": -3 / 5, "num-examples": -11 / 13}
"""Of f₀ + f₁, where θ − 1 + 4(θ + 1) = 0; of f₀ + 3f₁, where θ − 1 + 12(θ + 1) = 0."""


def test_two_rounds_by_hand(tmp_path: Path) -> None:
    """η = 0.1, K = 2, η_s = 0.5, clients that count equally.

    Round 1, θ = c = 0. θ₀: 0.1, then 0.1 + 0.09 = 0.19; c₀ = −0.19/0.2 = −0.95. θ₁: −0.4, then
    −0.4 − 0.24 = −0.64; c₁ = 3.2. θ = 0.5 · (0.19 − 0.64)/2 = −0.1125, c = (−0.95 + 3.2)/2 = 1.125.
    Round 2. Client 0 adds c − c₀ = 2.075: −1.1125 + 2.075 = 0.9625 gives −0.20875, then
    −1.20875 + 2.075 = 0.86625 gives −0.295375. Client 1 adds −2.075: 3.55 − 2.075 = 1.475 gives −0.26,
    then 2.96 − 2.075 = 0.885 gives −0.3485. θ = −0.1125 − 0.5 · (0.182875 + 0.236)/2 = −0.21721875.
    """
    config = replace(CONFIG, server_learning_rate=0.5)
    assert theta_after(METHOD, config, tmp_path, 1) == pytest.approx(-0.1125, abs=1e-14)
    assert theta_after(METHOD, config, tmp_path, 2) == pytest.approx(-0.21721875, abs=1e-14)


def equal_shards(partition: int) -> tuple[Tensor, Tensor]:
    x, y = two_quadratics(partition)
    return x[:1], y[:1]


@pytest.mark.parametrize("weighting", ["uniform", "num-examples"])
def test_the_first_round_on_equal_shards_is_fedavgs(weighting: str, tmp_path: Path) -> None:
    config = replace(CONFIG, weighting=weighting)
    averaged = theta_after(fedavg.METHOD, config, tmp_path, 1, data=equal_shards)
    assert theta_after(METHOD, config, tmp_path, 1, data=equal_shards) == pytest.approx(averaged, abs=1e-15)
    later = theta_after(fedavg.METHOD, config, tmp_path, 2, data=equal_shards)
    assert abs(theta_after(METHOD, config, tmp_path, 2, data=equal_shards) - later) > 0.01


def test_with_one_client_it_is_fedavg(tmp_path: Path) -> None:
    """c = cᵢ then, in every round."""
    config = replace(CONFIG, min_available_nodes=1)
    averaged = theta_after(fedavg.METHOD, config, tmp_path, 4, nodes=1)
    assert theta_after(METHOD, config, tmp_path, 4, nodes=1) == pytest.approx(averaged, abs=1e-14)


@pytest.mark.parametrize("weighting", OPTIMUM)
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_it_ends_at_the_optimum(fraction: float, weighting: str, tmp_path: Path) -> None:
    """Where FedAvg of two local steps does not, and with one client of two in a round."""
    config = replace(CONFIG, fraction_train=fraction, weighting=weighting)
    assert theta_after(METHOD, config, tmp_path, 40) == pytest.approx(OPTIMUM[weighting], abs=1e-4)
    assert abs(theta_after(fedavg.METHOD, replace(CONFIG, fraction_train=1.0), tmp_path, 40) + 11 / 13) > 0.01


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_a_lost_state_is_survived_and_the_optimum_is_kept(
    fraction: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """All states are deleted after round 10: c then starts anew, where a c that kept the lost would be off."""

    def delete(job: Job, partition: int, reply: Message) -> None:
        if job.server_round == 10:
            shutil.rmtree(tmp_path / "state")

    config = replace(CONFIG, fraction_train=fraction)
    found = theta_after(METHOD, config, tmp_path / "state", 50, spoil=delete)
    assert "clients have lost their control variates: all begin anew" in caplog.text
    assert found == pytest.approx(OPTIMUM["uniform"], abs=1e-4)


def test_a_round_after_a_loss_averages_and_the_next_begins_anew(tmp_path: Path) -> None:
    """As above by hand, η_s = 1; state lost after round 1.

    Round 1: θ = (0.19 − 0.64)/2 = −0.225, c = 1.125. Round 2, both with cᵢ = 0, adding 1.125:
    θ₀: −1.225 + 1.125 = −0.1 gives −0.215, then −1.215 + 1.125 = −0.09 gives −0.206; θ₁: 3.1 + 1.125 =
    4.225 gives −0.6475, then 1.41 + 1.125 = 2.535 gives −0.901. θ = (−0.206 − 0.901)/2 = −0.5535.
    Round 3 with c = cᵢ = 0 is FedAvg's: θ₀ = 1 − 0.81 · 1.5535, θ₁ = −1 + 0.36 · 0.4465.
    """

    def delete(job: Job, partition: int, reply: Message) -> None:
        if job.server_round == 1:
            shutil.rmtree(tmp_path / "state")

    second = theta_after(METHOD, CONFIG, tmp_path / "state", 2, spoil=delete)
    assert second == pytest.approx(-0.5535, abs=1e-14)
    third = (1 - 0.81 * 1.5535 - 1 + 0.36 * 0.4465) / 2
    assert theta_after(METHOD, CONFIG, tmp_path / "state", 3, spoil=delete) == pytest.approx(third, abs=1e-14)


def test_with_one_client_of_two_in_a_round_c_is_half_of_its_variate(tmp_path: Path) -> None:
    """|S|/N = ½: after the first round, as by hand above, c = −0.95/2 or 3.2/2."""
    seen: list[float] = []

    def noting(job: Job) -> Message:
        seen.extend(float(c) for c in job.extra().values())
        return METHOD.client(job)

    theta_after(replace(METHOD, client=noting), replace(CONFIG, fraction_train=0.5), tmp_path, 2)
    assert len(seen) == 1
    assert min(abs(seen[0] + 0.475), abs(seen[0] - 1.6)) < 1e-14


@pytest.mark.parametrize("rounds", [(5, 8), (5, 6, 7, 8)], ids=["now and then", "four in a row"])
def test_a_lost_reply_is_no_lost_state(
    rounds: tuple[int, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The client steps with the cᵢ that the server has, not with its newest, and c stays the mean."""

    def lose(job: Job, partition: int, reply: Message) -> None:
        if job.server_round in rounds and partition == 1:
            raise RuntimeError("the reply is lost on its way")

    assert theta_after(METHOD, CONFIG, tmp_path, 40, spoil=lose) == pytest.approx(OPTIMUM["uniform"], abs=1e-4)
    assert "control variates" not in caplog.text


def test_a_failed_round_leaves_no_variates(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Round 2 lacks a reply: rounds 1 and 3 are then as rounds 1 and 2 without it, on both sides."""

    def fail_once(job: Job, partition: int, reply: Message) -> None:
        if (job.server_round, partition) == (2, 0):
            raise RuntimeError("nothing from here")

    found = theta_after(METHOD, replace(CONFIG, min_replies=2), tmp_path, 3, spoil=fail_once)
    assert found == theta_after(METHOD, CONFIG, tmp_path, 2)
    assert "control variates" not in caplog.text


@pytest.mark.parametrize("how", BROKEN)
def test_broken_replies_are_left_out(how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_left_out(METHOD, CONFIG, tmp_path, broken_arrays(how), BROKEN[how], caplog)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (None, "it holds no 'extra' tensors"),
        ({}, "its 'extra' tensors are not those asked for; missing or extra: weight"),
        ({"weight": torch.zeros(2, 1)}, "its 'extra' tensor 'weight' is [2, 1], not [1, 1]"),
        ({"weight": torch.full((1, 1), torch.nan)}, "is not finite floating-point numbers"),
    ],
)
def test_broken_variates_are_left_out(
    extra: dict[str, Tensor] | None, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def spoil(job: Job, partition: int, reply: Message) -> None:
        if (job.server_round, partition) == (2, 1):
            record = ConfigRecord() if extra is None else messages.tensors_record(extra)
            reply.content[messages.EXTRA] = record

    check_left_out(METHOD, CONFIG, tmp_path, spoil, reason, caplog)


def test_it_learns(tmp_path: Path) -> None:
    check_learns(tmp_path, {"algorithm": "scaffold", "learning-rate": 0.3})


def test_the_application_survives_a_lost_state(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def forgetful(message: Message, context: Context) -> Message:
        if "train" in message.metadata.message_type and messages.server_round_of(message) == 3:
            shutil.rmtree(tmp_path / "state", ignore_errors=True)
        return client_app.app(message, context)

    settings = {"algorithm": "scaffold", "learning-rate": 0.3, "num-server-rounds": 4}
    rows = digits(tmp_path, settings, forgetful)
    assert [row.get("lost-variates", 0) > 0 for row in rows] == [False, False, False, True, False]
    assert rows[-1]["test-loss"] < rows[0]["test-loss"] - 0.02
    assert "round 3: 4 clients have lost their control variates: all begin anew" in caplog.text
