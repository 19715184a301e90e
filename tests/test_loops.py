"""Training loops as users write them, through Flower: what they do to the step, they do to FedPM's rounds."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.testing._internal.distributed.fake_pg import FakeStore

from fedpm_flwr import messages
from fedpm_flwr.optim import FOOF, SecondOrder
from fedpm_flwr.strategy import FedPM
from fedpm_flwr.wire import decode

from .apps import federate
from .test_optim import OPTIMIZERS, Make, data, network, vector

Batch = tuple[Tensor, Tensor]
Loop = Callable[[nn.Module, SecondOrder, Sequence[Batch]], None]
CLIENTS, EPOCHS = 3, 2


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def batches_of(partition: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(partition)
    x = torch.randn(3, 8, 3, generator=generator) * (1 + partition)
    return [(part, (part[:, 0] > 0).long()) for part in x]


def backward(model: nn.Module, batch: Batch, share: float = 1.0) -> Tensor:
    loss = F.cross_entropy(model(batch[0]), batch[1]) * share
    loss.backward()
    return loss


def plain(model: nn.Module, optimizer: SecondOrder, batches: Sequence[Batch]) -> None:
    for batch in batches:
        optimizer.zero_grad()
        backward(model, batch)
        optimizer.step()


def with_closure(model: nn.Module, optimizer: SecondOrder, batches: Sequence[Batch]) -> None:
    for batch in batches:

        def closure(batch: Batch = batch) -> float:
            optimizer.zero_grad()
            return float(backward(model, batch).detach())

        assert optimizer.step(closure) > 0


def zeroing_in_place(model: nn.Module, optimizer: SecondOrder, batches: Sequence[Batch]) -> None:
    for batch in batches:
        optimizer.zero_grad(set_to_none=False)
        backward(model, batch)
        optimizer.step()


def clipping(model: nn.Module, optimizer: SecondOrder, batches: Sequence[Batch]) -> None:
    for batch in batches:
        optimizer.zero_grad()
        backward(model, batch)
        nn.utils.clip_grad_norm_(model.parameters(), 1e6)
        optimizer.step()


def accumulating(model: nn.Module, optimizer: SecondOrder, batches: Sequence[Batch]) -> None:
    for x, y in batches:
        optimizer.zero_grad()
        for part in (slice(0, 2), slice(2, 8)):
            backward(model, (x[part], y[part]), len(x[part]) / len(x))
        optimizer.step()


def scaling(model: nn.Module, optimizer: SecondOrder, batches: Sequence[Batch]) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for batch in batches:
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(batch[0]), batch[1])).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1e6)
        scaler.step(optimizer)
        scaler.update()


def scheduling(model: nn.Module, optimizer: SecondOrder, batches: Sequence[Batch]) -> None:
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)
    for batch in batches:
        plain(model, optimizer, [batch])
        scheduler.step()


def warming_up_without_a_model(model: nn.Module, optimizer: SecondOrder, batches: Sequence[Batch]) -> None:
    """Looks at its loss first, as many do, and validates in between: neither is measured."""
    with torch.no_grad():
        model(batches[0][0])
    for batch in batches:
        plain(model, optimizer, [batch])
        model.eval()
        model(100 * batch[0])
        model.train()


def autocasting(model: nn.Module, optimizer: SecondOrder, batches: Sequence[Batch]) -> None:
    for batch in batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        optimizer.step()


def app_of(loop: Loop, seen: list[RecordDict] | None = None, make: Make = FOOF, **options: Any) -> ClientApp:
    """The quickstart's client, with this loop in it."""
    app = ClientApp()

    @app.train()
    def train(msg: Message, context: Context) -> Message:
        model = make_model()
        model.load_state_dict(msg.content.array_records["arrays"].to_torch_state_dict())
        model.train()
        optimizer = make(model, **{"lr": 0.3, "damping": 0.1, "inverse_interval": 2, **options})
        batches = batches_of(messages.partition_of(context)[0])
        for _ in range(EPOCHS):
            loop(model, optimizer, batches)
        content = RecordDict(
            {
                "arrays": ArrayRecord(model.state_dict()),
                "metrics": MetricRecord({"num-examples": sum(len(x) for x, _ in batches)}),
                "curvature": messages.curvature_record(optimizer, msg),
            }
        )
        if seen is not None:
            seen.append(content)
        return Message(content=content, reply_to=msg)

    return app


def trained(client: ClientApp, rounds: int = 2) -> Tensor:
    strategy = FedPM(fraction_evaluate=0.0)
    state = federate(client, strategy, make_model(), CLIENTS, rounds).arrays.to_torch_state_dict()
    return torch.cat([value.flatten() for value in state.values()])


@pytest.mark.parametrize(
    "loop",
    [
        with_closure,
        zeroing_in_place,
        clipping,
        accumulating,
        scaling,
        scheduling,
        warming_up_without_a_model,
    ],
)
def test_the_loop_is_no_matter(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[RecordDict] = []
    torch.testing.assert_close(trained(app_of(loop, seen)), trained(app_of(plain)), rtol=1e-4, atol=1e-5)
    assert "left out" not in caplog.text
    assert "no reply held curvature" not in caplog.text
    assert all(len(layers(content)) == 2 for content in seen)


def layers(content: RecordDict) -> list[Any]:
    payload = content.config_records["curvature"]["payload"]
    assert isinstance(payload, bytes)
    return decode(payload, {key: tuple(array.shape) for key, array in content.array_records["arrays"].items()})


def test_under_autocast_a_round_is_nearly_the_same() -> None:
    start = torch.cat([value.flatten() for value in make_model().state_dict().values()])
    moved = trained(app_of(plain)) - start
    assert float((trained(app_of(autocasting)) - start - moved).norm() / moved.norm()) < 0.05


def test_gradients_clipped_to_nothing_move_nothing() -> None:
    """The clip is of the gradients, before P⁻¹; FOOF's own ``clip`` is of the update."""

    def loop(model: nn.Module, optimizer: SecondOrder, batches: Sequence[Batch]) -> None:
        for batch in batches:
            optimizer.zero_grad()
            backward(model, batch)
            nn.utils.clip_grad_norm_(model.parameters(), 1e-9)
            optimizer.step()

    start = torch.cat([value.flatten() for value in make_model().state_dict().values()])
    torch.testing.assert_close(trained(app_of(loop)), start, rtol=0, atol=1e-6)


SCHEDULERS: dict[str, Callable[[SecondOrder], Any]] = {
    "one-cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=20),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.05, max_lr=0.3),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=2),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "warm-up": lambda o: lr_scheduler.LinearLR(o, total_iters=3),
}


@pytest.mark.filterwarnings("ignore:no curvature for norm")
@pytest.mark.parametrize("schedule", SCHEDULERS)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_schedulers_set_what_they_say_and_every_optimizer_steps_by_it(make: Make, schedule: str) -> None:
    """A second optimizer, whose groups are set by hand, takes the same steps."""
    model, twin = network(), network()
    optimizer, other = make(model), make(twin)
    scheduler = SCHEDULERS[schedule](optimizer)
    rates, momenta = set(), set()
    for _ in range(4):
        for key in ("lr", "momentum"):
            other.param_groups[0][key] = optimizer.param_groups[0][key]
        rates.add(other.param_groups[0]["lr"])
        momenta.add(other.param_groups[0]["momentum"])
        for net, opt in ((model, optimizer), (twin, other)):
            opt.zero_grad()
            loss = F.cross_entropy(outputs := net(data()[0]), data()[1])
            opt.measure(loss, outputs)
            loss.backward()
            opt.step()
        scheduler.step(*([1.0] if schedule == "plateau" else []))
    assert len(rates) > 1
    assert (len(momenta) > 1) == (schedule in ("one-cycle", "cyclic"))
    torch.testing.assert_close(vector(model), vector(twin))


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:no curvature for norm")
def test_a_step_that_a_scaler_skips_leaves_the_model_and_no_harm(make: Make) -> None:
    model = network().float()
    optimizer = make(model)
    scaler = torch.amp.GradScaler("cpu")
    moved = []
    for overflow in (float("inf"), 1.0):
        before = vector(model)
        optimizer.zero_grad()
        loss = F.cross_entropy(outputs := model(data()[0].float()), data()[1])
        optimizer.measure(loss, outputs)
        scaler.scale(loss * overflow).backward()
        scaler.step(optimizer)
        scaler.update()
        moved.append(not torch.equal(vector(model), before))
    assert moved == [False, True]
    assert torch.isfinite(vector(model)).all()
    for layer in optimizer.preconditioners():
        assert all(torch.isfinite(part).all() for part in layer.curvature.parts().values())


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:no curvature for")
def test_layers_frozen_after_the_optimizer_was_made_stay_and_the_others_go_on(make: Make) -> None:
    model = network()
    optimizer = make(model, refresh_interval=1)
    for frozen in (False, True):
        model.head.requires_grad_(not frozen)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.zero_grad()
        loss = F.cross_entropy(outputs := model(data()[0]), data()[1])
        optimizer.measure(loss, outputs)
        loss.backward()
        optimizer.param_groups[0]["damping"] = 0.1  # Newton's H has rows of 0 now
        optimizer.step()
        moved = {name: not torch.equal(p, before[name]) for name, p in model.named_parameters()}
        assert moved["body.weight"]
        assert moved["head.weight"] == (not frozen)


@pytest.mark.parametrize("how", ["unfrozen", "added"])
@pytest.mark.filterwarnings("ignore:no curvature for")
def test_parameters_that_come_later_take_plain_steps_and_are_named_once(how: str) -> None:
    model = network()
    model.body.requires_grad_(False)
    optimizer = FOOF(model, None if how == "unfrozen" else model.head.parameters(), lr=0.5, plain_lr=0.25)
    model.body.requires_grad_(True)
    if how == "added":
        optimizer.add_param_group({"params": model.body.parameters(), "lr": 0.5, "plain_lr": 0.25})
    before = model.body.weight.detach().clone()
    F.cross_entropy(model(data()[0]), data()[1]).backward()
    with pytest.warns(
        UserWarning, match="2 parameters were frozen or not there when the optimizer was made"
    ) as said:
        optimizer.step()
    assert said[0].filename == __file__
    assert model.body.weight.grad is not None
    torch.testing.assert_close(model.body.weight.detach(), before - 0.25 * model.body.weight.grad)
    assert [layer.block.name for layer in optimizer.preconditioners()] == ["head"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_parameters_in_place_of_the_model_are_refused(make: Make) -> None:
    with pytest.raises(
        TypeError, match=r"takes the model, whose layers it has to see, not a generator: \w+\(model"
    ):
        make(network().parameters())


def test_a_model_on_several_devices_is_refused() -> None:
    model = nn.DataParallel(network())
    model.device_ids = [0, 1]  # as where there are two GPUs
    with pytest.raises(ValueError, match="FOOF measures curvature on one device, in one process"):
        FOOF(model)


@pytest.mark.parametrize("make", [OPTIMIZERS[name] for name in ("foof", "kfac", "sophia")])
@pytest.mark.filterwarnings("ignore:no curvature for norm")
def test_replicas_of_data_parallel_are_refused_where_it_was_made_later(make: Make) -> None:
    """As of two GPUs, made by torch's own method, which needs none; a replica's inputs are a part of the batch."""
    model: nn.Module = network()
    optimizer = make(model)
    replica = model._replicate_for_data_parallel()
    replica._modules = {name: child._replicate_for_data_parallel() for name, child in model.named_children()}
    for name, p in model.named_parameters():
        layer, key = name.split(".")
        setattr(replica._modules[layer], key, p * 1.0)
    with pytest.raises(
        ValueError, match="measures curvature on one device, in one process, not where DataParallel"
    ):
        replica(data()[0])
    with torch.no_grad():
        replica(data()[0])  # an evaluation measures nothing
    assert optimizer.preconditioners() == []


@pytest.mark.filterwarnings("ignore:no curvature for norm")
def test_a_model_in_several_processes_is_refused() -> None:
    """torch's own group without the others: two processes as far as this one can tell."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        inner = network()
        for model in (nn.parallel.DistributedDataParallel(inner), inner):
            with pytest.raises(ValueError, match="FOOF measures curvature on one device, in one process"):
                FOOF(model)
    finally:
        torch.distributed.destroy_process_group()
    FOOF(inner)
