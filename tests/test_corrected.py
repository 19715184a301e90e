"""Corrected FedPM: the floor of many local steps is gone, and nothing that is lost or wrong breaks it.

The clients of ``logistic``, through the real strategy and ClientApp.
"""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flwr.app import Message
from torch import Tensor, nn

from fedpm_flwr import messages
from fedpm_flwr.algorithms import get_algorithm
from fedpm_flwr.config import Config
from fedpm_flwr.guarded import Guarded
from fedpm_flwr.method import Job
from fedpm_flwr.objective import Objective
from fedpm_flwr.replies import read_tensors

from .apps import federate, ordered
from .jobs import Examples, Spoil, app_of, untouched
from .logistic import BASE, SIZES, client_data, make_model, minimiser

ENOUGH = 10
"""Rounds: after eight, float64 cannot tell the model from the optimum any more."""


def run(
    config: Config,
    folder: Path,
    rounds: int,
    start: Tensor | None = None,
    spoil: Spoil = untouched,
    strategy: Guarded | None = None,
    dtype: torch.dtype = torch.float64,
    **more: Any,
) -> tuple[Tensor, Any]:
    """θ after so many rounds, and what the strategy's ``start`` returned."""

    def make() -> nn.Module:
        return make_model().to(dtype)

    def data(partition: int) -> Examples:
        x, y = client_data(partition)
        return x.to(dtype), y

    method, model = get_algorithm(config.algorithm), make()
    server = strategy or method.strategy(replace(config, state_folder=str(folder / "server")))
    for key, value in more.items():
        setattr(server, key, value)
    if start is not None:
        Objective(model, [], F.cross_entropy).move_to(start)
    app = app_of(
        method,
        config,
        folder / "clients",
        data=data,
        make_model=make,
        loss=F.cross_entropy,
        spoil=spoil,
    )
    result = federate(app, server, model, len(SIZES), rounds, ordered)
    (theta,) = result.arrays.to_torch_state_dict().values()
    return theta.flatten(), result


def corrected_steps(reply: Message) -> int:
    number = reply.content.metric_records[messages.METRICS]["corrected-steps"]
    assert isinstance(number, int)
    return number


def check_left_out(spoilt: Mapping[int, str], partition: int, caplog: pytest.LogCaptureFixture) -> None:
    """One reply in each of these rounds, of this client; no other."""
    lines = [record.getMessage() for record in caplog.records if "left out the reply" in record.getMessage()]
    for server_round, line in zip(spoilt, lines, strict=True):
        assert f"round {server_round}:" in line, spoilt[server_round]
        assert f"(partition {partition})" in line


@pytest.fixture(scope="module")
def optimum() -> Tensor:
    return minimiser([float(size) for size in SIZES])


@pytest.mark.parametrize("steps", [2, 3, 5])
@pytest.mark.parametrize("correction", ["control-variate", "fresh"])
def test_many_local_steps_reach_the_optimum(steps: int, correction: str, optimum: Tensor, tmp_path: Path) -> None:
    theta, _ = run(replace(BASE, local_steps=steps, correction=correction), tmp_path, ENOUGH)
    assert (theta - optimum).norm() < 1e-12


@pytest.mark.parametrize(("steps", "correction"), [(2, "fresh"), (3, "control-variate"), (5, "fresh")])
def test_fedpm_reads_no_correction_and_stalls(
    steps: int, correction: str, optimum: Tensor, tmp_path: Path
) -> None:
    config = replace(BASE, algorithm="fedpm", local_steps=steps, correction=correction)
    theta, _ = run(config, tmp_path, ENOUGH)
    assert (theta - optimum).norm() > 1e-2


def test_a_strategy_may_run_twice(tmp_path: Path) -> None:
    """With nothing left of the first run in the second."""
    method = get_algorithm(BASE.algorithm)
    strategy = method.strategy(replace(BASE, state_folder=str(tmp_path / "server")))
    first, _ = run(BASE, tmp_path, 3, strategy=strategy)
    again, _ = run(BASE, tmp_path, 3, strategy=strategy)
    assert torch.equal(first, again)


@pytest.mark.parametrize("correction", ["control-variate", "fresh"])
def test_uniform_weights_lead_to_the_optimum_of_the_uniform_mean(correction: str, tmp_path: Path) -> None:
    theta, _ = run(replace(BASE, weighting="uniform", correction=correction), tmp_path, ENOUGH)
    assert (theta - minimiser([1.0] * len(SIZES))).norm() < 1e-12


def test_in_float32_it_ends_as_near_as_float32_tells(optimum: Tensor, tmp_path: Path) -> None:
    theta, _ = run(BASE, tmp_path, ENOUGH, dtype=torch.float32)
    assert theta.dtype == torch.float32
    assert (theta - optimum).norm() < 1e-5


def test_fresh_gradients_that_cannot_be_used_leave_their_client_out(
    optimum: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spoilt = {2: "nan", 3: "float8", 4: "missing"}

    def spoil(job: Job, partition: int, reply: Message) -> None:
        if partition == 3 and job.phase == "gradient" and job.server_round in spoilt:
            (good,) = read_tensors(reply.content).values()
            wrong = {"nan": good * torch.nan, "float8": good.to(torch.float8_e4m3fn)}
            del reply.content[messages.EXTRA]
            if (how := spoilt[job.server_round]) in wrong:
                reply.content[messages.EXTRA] = messages.tensors_record({"theta.weight": wrong[how]})

    with caplog.at_level(logging.WARNING, "flwr"):
        theta, _ = run(replace(BASE, correction="fresh"), tmp_path, max(spoilt) + ENOUGH, spoil=spoil)
    check_left_out(spoilt, 3, caplog)
    assert (theta - optimum).norm() < 1e-12


def test_the_optimum_is_a_fixed_point(optimum: Tensor, tmp_path: Path) -> None:
    """gᵢ − cᵢ + c = 0 for every client at θ* if cᵢ = gᵢ(θ*): nobody moves, however many steps."""
    stays, _ = run(replace(BASE, correction="fresh", local_steps=7), tmp_path, 1, start=optimum)
    assert (stays - optimum).norm() < 1e-13
    moves, _ = run(replace(BASE, algorithm="fedpm", local_steps=7), tmp_path, 1, start=optimum)
    assert (moves - optimum).norm() > 1e-3


def test_a_round_of_one_step_is_newtons_whatever_the_pair(tmp_path: Path) -> None:
    """Σ wᵢ(cᵢ − c) = 0, so the pair of the round before cancels in Σ wᵢPᵢ(θᵢ − θ)."""
    one_step = replace(BASE, local_steps=1)
    corrected, _ = run(one_step, tmp_path, 4)
    plain, _ = run(replace(one_step, algorithm="fedpm"), tmp_path, 4)
    torch.testing.assert_close(corrected, plain, rtol=1e-9, atol=1e-12)


def test_the_first_round_is_fedpms(tmp_path: Path) -> None:
    """c = cᵢ = 0: to the last bit."""
    corrected, _ = run(replace(BASE, local_steps=2), tmp_path, 1)
    plain, _ = run(replace(BASE, algorithm="fedpm", local_steps=2), tmp_path, 1)
    assert torch.equal(corrected, plain)


@pytest.mark.parametrize(
    ("optimizer", "changes", "rounds", "below"),
    [
        ("foof", {"damping": 0.01}, 20, 1e-3),
        ("kfac", {"damping": 0.01, "fisher": "exact"}, 12, 1e-8),
        ("ltda", {"learning_rate": 0.2, "damping": 1.0}, 20, 1e-2),
        ("sophia", {"learning_rate": 0.2, "sophia_gamma": 1.0}, 20, 1e-1),
    ],
)
def test_every_curvature(
    optimizer: str, changes: dict[str, Any], rounds: int, below: float, optimum: Tensor, tmp_path: Path
) -> None:
    config = replace(BASE, optimizer=optimizer, **changes)
    theta, _ = run(config, tmp_path, rounds)
    stalled, _ = run(replace(config, algorithm="fedpm"), tmp_path, rounds)
    error, floor = (theta - optimum).norm(), (stalled - optimum).norm()
    assert error < min(below, 0.3 * floor), (error, floor)


def test_half_of_the_clients(optimum: Tensor, tmp_path: Path) -> None:
    theta, _ = run(BASE, tmp_path, 45, fraction_train=0.5)
    assert (theta - optimum).norm() < 1e-4
    stalled, _ = run(replace(BASE, algorithm="fedpm"), tmp_path, 10, fraction_train=0.5)
    assert (stalled - optimum).norm() > 1e-2


def test_a_client_that_loses_its_state_goes_on(optimum: Tensor, tmp_path: Path) -> None:
    steps: dict[tuple[int, int], int] = {}

    def lose(job: Job, partition: int, reply: Message) -> None:
        steps[partition, job.server_round] = corrected_steps(reply)
        if partition == 2 and job.server_round == 4:
            shutil.rmtree(job.state._folder)

    theta, _ = run(BASE, tmp_path, 5 + ENOUGH, spoil=lose)
    assert (steps[2, 4], steps[2, 5], steps[2, 6]) == (3, 0, 3)
    assert all(steps[other, 5] for other in (0, 1, 3, 4, 5))
    assert (theta - optimum).norm() < 1e-12


def test_a_reply_that_is_lost_leaves_the_pair_of_the_round_before(optimum: Tensor, tmp_path: Path) -> None:
    """The client has a newer cᵢ than the server then, and goes by the one that the server names."""
    corrected: dict[tuple[int, int], int] = {}

    def lose(job: Job, partition: int, reply: Message) -> None:
        corrected[partition, job.server_round] = corrected_steps(reply)
        if partition == 1 and job.server_round == 4:
            raise ConnectionError("gone")

    theta, _ = run(BASE, tmp_path, 5 + ENOUGH, spoil=lose)
    assert corrected[1, 5] == 3
    assert (theta - optimum).norm() < 1e-12


def test_a_variate_that_cannot_be_used_leaves_its_reply_out(
    optimum: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spoilt = dict(enumerate(["missing", "nan", "huge", "float8", "shape", "name", "bytes"], start=2))

    def spoil(job: Job, partition: int, reply: Message) -> None:
        if partition == 3 and job.server_round in spoilt:
            record, good = spoilt[job.server_round], read_tensors(reply.content)
            (key,) = good
            wrong = {
                "nan": {key: good[key] * float("nan")},
                "huge": {key: torch.full_like(good[key], 1e308)},
                "float8": {key: good[key].to(torch.float8_e4m3fn)},
                "shape": {key: good[key][:, :2]},
                "name": {"bias": good[key]},
            }
            del reply.content[messages.EXTRA]
            if record == "bytes":
                reply.content[messages.EXTRA] = messages.tensors_record(good)
                reply.content.config_records[messages.EXTRA][messages.PAYLOAD] = b"no safetensors"
            elif record != "missing":
                reply.content[messages.EXTRA] = messages.tensors_record(wrong[record])

    with caplog.at_level(logging.WARNING, "flwr"):
        theta, _ = run(BASE, tmp_path, max(spoilt) + ENOUGH, spoil=spoil)
    check_left_out(spoilt, 3, caplog)
    assert (theta - optimum).norm() < 1e-12


def test_a_failed_round_does_not_count(optimum: Tensor, tmp_path: Path) -> None:
    """Too few usable replies: what they brought is not in c, and the clients step by what is."""

    def fail(job: Job, partition: int, reply: Message) -> None:
        if job.server_round == 3 and partition != 0:
            raise ConnectionError("gone")

    rounds = 3 + ENOUGH
    theta, result = run(BASE, tmp_path, rounds, spoil=fail, min_replies=3)
    assert sorted(result.train_metrics_clientapp) == [n for n in range(1, rounds + 1) if n != 3]
    assert (theta - optimum).norm() < 1e-12


@pytest.mark.parametrize("gone", ["replies", "rounds"])
def test_failures_in_a_row_leave_the_pair_that_counts(gone: str, optimum: Tensor, tmp_path: Path) -> None:
    """Four replies of one client, or four whole rounds: both sides still have the pair of before."""
    corrected: dict[tuple[int, int], int] = {}

    def fail(job: Job, partition: int, reply: Message) -> None:
        corrected[partition, job.server_round] = corrected_steps(reply)
        if 5 <= job.server_round <= 8 and (partition == 1 or gone == "rounds"):
            raise ConnectionError("gone")

    theta, _ = run(BASE, tmp_path, 8 + ENOUGH, spoil=fail, max_failed_rounds=5)
    assert {corrected[partition, 9] for partition in range(6)} == {3}
    assert (theta - optimum).norm() < 1e-12


def test_a_full_disk_costs_the_correction_and_not_the_run(
    optimum: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Clients that cannot keep cᵢ step uncorrected; so do all, if the server cannot."""

    def full(*arguments: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("fedpm_flwr.durable.save_file", full)
    with caplog.at_level(logging.WARNING, "flwr"):
        theta, _ = run(BASE, tmp_path / "corrected", 3)
    assert "client state could not be written, later rounds go on without it: no space left" in caplog.text
    assert "a control variate could not be written, the client's last one stands: no space left" in caplog.text
    plain, _ = run(replace(BASE, algorithm="fedpm"), tmp_path / "plain", 3)
    torch.testing.assert_close(theta, plain, rtol=1e-12, atol=1e-12)
    assert not list(tmp_path.rglob("*.safetensors"))
