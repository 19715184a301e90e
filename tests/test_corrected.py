"""Corrected FedPM: the floor of many local steps is gone, and nothing that is lost or wrong breaks it.

Clients of very different logistic regressions, all in float64, through the real strategy and ClientApp.
"""

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from fedpm_flwr import control_variates, messages
from fedpm_flwr.algorithms import get_algorithm
from fedpm_flwr.config import Config
from fedpm_flwr.control_variates import Variates, weighted_mean
from fedpm_flwr.inline import _task_identity
from fedpm_flwr.method import Job
from fedpm_flwr.objective import Objective
from fedpm_flwr.reproducible import PartitionOrderedGrid
from fedpm_flwr.state import ClientState
from fedpm_flwr.strategy import FedPM
from fedpm_flwr.tasks.models import Logistic

from .apps import federate

SIZES = [30, 50, 20, 60, 40, 40]
IN = 4
BASE = Config(
    algorithm="fedpm-corrected",
    optimizer="newton",
    learning_rate=1.0,
    damping=0.0,
    ema=0.0,
    refresh_interval=1,
    inverse_interval=1,
    codec="triangle-float64",
    weight_decay=0.05,
    local_steps=3,
    batch_size=0,
)


def client_data(partition: int) -> tuple[Tensor, Tensor]:
    """Inputs of other means and scales, and other separating planes, at each client."""
    generator = torch.Generator().manual_seed(partition)
    x = torch.randn(SIZES[partition], IN, dtype=torch.float64, generator=generator)
    x = x * (1 + torch.arange(IN) * (partition + 1) / 6) + 0.5 * (partition - 2)
    plane = torch.randn(IN, dtype=torch.float64, generator=generator)
    noise = torch.randn(SIZES[partition], dtype=torch.float64, generator=generator)
    return x, (x @ plane + noise > 0).long()


def make_model() -> nn.Module:
    return Logistic(IN).double()


def batches_of(config: Config, partition: int) -> list[tuple[Tensor, Tensor]]:
    x, y = client_data(partition)
    size = config.batch_size or len(x)
    return list(zip(torch.split(x, size), torch.split(y, size), strict=True))


Meddle = Callable[[int, int, ClientState, Message], Message | None]


def client_app(config: Config, folder: Path, meddle: Meddle = lambda *_: None) -> ClientApp:
    """Clients of the configured algorithm; ``meddle(partition, round, state, reply)`` after each reply."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition = messages.partition_of(context)[0]
        model = make_model()
        model.load_state_dict(message.content.array_records[messages.ARRAYS].to_torch_state_dict())
        batches = batches_of(config, partition)
        run = messages.asked(message, messages.EXPERIMENT)
        assert run
        state = ClientState(folder, run, f"client-{partition}")
        job = Job(
            config=config,
            request=message,
            model=model,
            batches=batches,
            examples=SIZES[partition],
            steps_an_epoch=len(batches),
            loss=F.cross_entropy,
            device=torch.device("cpu"),
            seed=partition,
            state=state,
        )
        reply = get_algorithm(config.algorithm).client(job)
        return meddle(partition, job.server_round, state, reply) or reply

    @app.query(messages.PARTITION_ACTION)
    def partition(message: Message, context: Context) -> Message:
        return messages.partition_reply(message, context)

    return app


def run(
    config: Config,
    folder: Path,
    rounds: int,
    start: Tensor | None = None,
    meddle: Meddle = lambda *_: None,
    **more: Any,
) -> tuple[Tensor, Any]:
    """θ after so many rounds, and what the strategy's ``start`` returned."""
    strategy = get_algorithm(config.algorithm).strategy(replace(config, state_folder=str(folder / "server")))
    for key, value in more.items():
        setattr(strategy, key, value)
    model = make_model()
    if start is not None:
        Objective(model, [], F.cross_entropy).move_to(start)
    app = client_app(config, folder / "clients", meddle)
    result = federate(app, strategy, model, len(SIZES), rounds, wrap=lambda grid: PartitionOrderedGrid(grid, 0))
    (theta,) = result.arrays.to_torch_state_dict().values()
    return theta.flatten(), result


@pytest.fixture(scope="module")
def optimum() -> Tensor:
    """By Newton's method on all data together."""
    together = [client_data(i) for i in range(len(SIZES))]
    model = make_model()
    objective = Objective(model, together, F.cross_entropy, BASE.weight_decay)
    for _ in range(30):
        objective.move_to(objective.theta - torch.linalg.solve(objective.hessian(), objective.gradient()))
    assert objective.gradient().norm() < 1e-14
    return objective.theta


@pytest.mark.parametrize("steps", [2, 3, 5])
@pytest.mark.parametrize("correction", ["control-variate", "fresh"])
def test_many_local_steps_reach_the_optimum(steps: int, correction: str, optimum: Tensor, tmp_path: Path) -> None:
    """Where FedPM without the correction stalls."""
    config = replace(BASE, local_steps=steps, correction=correction)
    theta, _ = run(config, tmp_path, 14)
    assert (theta - optimum).norm() < 1e-12
    stalled, _ = run(replace(config, algorithm="fedpm"), tmp_path, 14)
    assert (stalled - optimum).norm() > 1e-3


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
        ("foof", {"damping": 0.01}, 40, 1e-3),
        ("kfac", {"damping": 0.01, "fisher": "exact"}, 15, 1e-8),
        ("ltda", {"learning_rate": 0.2, "damping": 1.0}, 30, 1e-2),
        ("sophia", {"learning_rate": 0.2, "sophia_gamma": 1.0}, 30, 1e-1),
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

    def lose(partition: int, number: int, state: ClientState, reply: Message) -> None:
        steps[partition, number] = int(reply.content.metric_records["metrics"]["corrected-steps"])  # type: ignore[arg-type]
        if partition == 2 and number == 4:
            shutil.rmtree(state._folder)

    theta, _ = run(BASE, tmp_path, 20, meddle=lose)
    assert (steps[2, 4], steps[2, 5], steps[2, 6]) == (3, 0, 3)
    assert all(steps[other, 5] for other in (0, 1, 3, 4, 5))
    assert (theta - optimum).norm() < 1e-12


def test_a_reply_that_is_lost_leaves_the_pair_of_the_round_before(optimum: Tensor, tmp_path: Path) -> None:
    """The client has a newer cᵢ than the server then, and goes by the one that the server names."""
    corrected: dict[tuple[int, int], int] = {}

    def lose(partition: int, number: int, state: ClientState, reply: Message) -> Message | None:
        corrected[partition, number] = int(reply.content.metric_records["metrics"]["corrected-steps"])  # type: ignore[arg-type]
        if partition == 1 and number == 4:
            raise ConnectionError("gone")
        return None

    theta, _ = run(BASE, tmp_path, 20, meddle=lose)
    assert corrected[1, 5] == 3
    assert (theta - optimum).norm() < 1e-12


@pytest.mark.parametrize("record", ["missing", "nan", "shape", "name", "bytes"])
def test_a_variate_that_cannot_be_used_leaves_its_reply_out(
    record: str, optimum: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def spoil(partition: int, number: int, state: ClientState, reply: Message) -> None:
        if partition == 3 and number == 2:
            good = messages.read_tensors(reply.content)
            (key,) = good
            wrong = {
                "nan": {key: good[key] * float("nan")},
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
        theta, _ = run(BASE, tmp_path, 18, meddle=spoil)
    assert "round 2: left out the reply of node" in caplog.text
    assert (theta - optimum).norm() < 1e-12


def test_a_failed_round_does_not_count(optimum: Tensor, tmp_path: Path) -> None:
    """Too few usable replies: what they brought is not in c, and the clients step by what is."""

    def fail(partition: int, number: int, state: ClientState, reply: Message) -> None:
        if number == 3 and partition != 0:
            raise ConnectionError("gone")

    theta, result = run(BASE, tmp_path, 18, meddle=fail, min_replies=3)
    assert sorted(result.train_metrics_clientapp) == [n for n in range(1, 19) if n != 3]
    assert (theta - optimum).norm() < 1e-12


def test_steps_that_make_it_worse_are_taken_back() -> None:
    """From far away full Newton steps overshoot: then only the first counts, with the P of that step."""
    config = replace(BASE, weight_decay=1e-3, local_steps=4)
    model = make_model()
    x = torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64).repeat(2, 1)
    y = torch.tensor([1, 0])
    objective = Objective(model, [(x, y)], F.cross_entropy, config.weight_decay)
    objective.move_to(torch.tensor([3.0, 0.0, 0.0, 0.0], dtype=torch.float64))  # H is small, g is not
    start, gradient, matrix = objective.theta, objective.gradient(), objective.hessian()
    reply = _answer(config, model, [(x, y)])
    metrics = reply.content.metric_records["metrics"]
    assert (metrics["local-steps"], metrics["corrected-steps"]) == (1, 0)
    (theta,) = reply.content.array_records["arrays"].to_torch_state_dict().values()
    torch.testing.assert_close(theta.flatten(), start - torch.linalg.solve(matrix, gradient), rtol=1e-10, atol=0)
    (layer,) = messages.read_curvature(reply, {"theta.weight": theta})
    torch.testing.assert_close(layer.curvature.damped(layer.damping).to_dense(IN), matrix, rtol=1e-10, atol=1e-14)


def test_batches_fall_back_to_fedpms_own_steps(tmp_path: Path) -> None:
    """Steps that are too long for the pair raise the corrected gradient, and are taken again without it."""
    batches = batches_of(replace(BASE, batch_size=10), 1)
    pair = {"theta.weight": torch.full((1, IN), 50.0, dtype=torch.float64)}
    for rate, kept in ((2.2, 0), (0.5, 6)):  # beyond 2 Newton's steps diverge
        config = replace(BASE, local_steps=6, learning_rate=rate, batch_size=10)
        reply = _answer(config, make_model(), batches, pair, tmp_path)
        plain = _answer(replace(config, algorithm="fedpm"), make_model(), batches)
        assert reply.content.metric_records["metrics"]["corrected-steps"] == kept
        assert reply.content.metric_records["metrics"]["local-steps"] == 6
        theta, expected = (
            message.content.array_records["arrays"].to_torch_state_dict()["theta.weight"]
            for message in (reply, plain)
        )
        assert torch.equal(theta, expected) == (not kept)


def _answer(
    config: Config,
    model: nn.Module,
    batches: list[tuple[Tensor, Tensor]],
    common: dict[str, Tensor] | None = None,
    folder: Path | None = None,
) -> Message:
    """A client's reply to a request of round 2; with c as given, and cᵢ = 0."""
    asked: dict[str, Any] = {messages.SERVER_ROUND: 2, messages.CURVATURE_CODEC: config.codec}
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "config": ConfigRecord(asked)})
    state = ClientState(folder, "run", "a")
    if common is not None:
        content["config"] = ConfigRecord({**asked, control_variates.VARIATE_ROUND: 1})
        content[messages.EXTRA] = messages.tensors_record(common)
        state.save(1, {key: torch.zeros_like(value) for key, value in common.items()})
    with _task_identity(1):
        request = Message(content, dst_node_id=1, message_type="train")
    request.metadata.__dict__["_message_id"] = "1"
    job = Job(
        config=config,
        request=request,
        model=model,
        batches=batches,
        examples=sum(len(y) for _, y in batches),
        steps_an_epoch=len(batches),
        loss=F.cross_entropy,
        device=torch.device("cpu"),
        seed=0,
        state=state,
    )
    with _task_identity(1):
        return get_algorithm(config.algorithm).client(job)


def test_the_mean_is_over_every_client_ever_seen_and_each_counts_once(tmp_path: Path) -> None:
    variates = Variates(tmp_path, "run")
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
    variates.requests([], {"w": torch.float32})  # the next round begins: the last one failed
    variates.commit()
    assert float(variates.mean()["w"]) == pytest.approx((5 + 12) / 4)


def test_a_damaged_file_of_the_server_costs_that_client_alone(tmp_path: Path) -> None:
    variates = Variates(tmp_path, "run")
    for node in (1, 2, 3):
        variates.add(node, 1, {"w": torch.tensor([float(node)])}, 1.0)
    variates.commit()
    (tmp_path / "run" / "server-2" / "1.safetensors").write_bytes(b"")
    variates.add(2, 2, {"w": torch.tensor([8.0])}, 1.0)
    variates.commit()
    assert float(variates.mean()["w"]) == pytest.approx((1 + 3 + 8) / 3)


def test_a_full_disk_costs_the_correction_and_not_the_run(
    optimum: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Clients that cannot keep cᵢ step uncorrected; so do all, if the server cannot."""

    def full(*arguments: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("fedpm_flwr.state.save_file", full)
    with caplog.at_level(logging.WARNING, "flwr"):
        theta, _ = run(BASE, tmp_path / "corrected", 3)
    assert "client state could not be written, later rounds go on without it: no space left" in caplog.text
    assert "a control variate could not be written, the client's last one stands: no space left" in caplog.text
    plain, _ = run(replace(BASE, algorithm="fedpm"), tmp_path / "plain", 3)
    torch.testing.assert_close(theta, plain, rtol=1e-12, atol=1e-12)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_weighted_mean_counts_what_is_missing_as_zero() -> None:
    mean = weighted_mean(
        [(1.0, {"a": torch.tensor(4.0), "b": torch.tensor(2.0)}), (3.0, {"a": torch.tensor(8.0)})]
    )
    assert {key: float(value) for key, value in mean.items()} == {"a": 7.0, "b": 0.5}


def test_an_unknown_correction_is_named() -> None:
    with pytest.raises(ValueError, match="unknown correction 'scaffold'; allowed: none, control-variate, fresh"):
        FedPM(correction="scaffold")
