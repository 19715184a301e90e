"""Models that are wrapped, tied, or of which a part alone is exchanged: curvature goes by the arrays' names."""

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Strategy
from torch import Tensor, nn

from fedpm_flwr import messages
from fedpm_flwr.curvature import Block, KroneckerRight, LayerCurvature
from fedpm_flwr.guarded import FailedRoundsError
from fedpm_flwr.mixing import ModelMixer
from fedpm_flwr.optim import FOOF, Newton, SecondOrder
from fedpm_flwr.strategy import FedPM
from fedpm_flwr.training import fit
from fedpm_flwr.wire import check_names, decode, in_names

from .apps import federate

CLIENTS = 3
State = Mapping[str, Tensor]
pytestmark = pytest.mark.filterwarnings("ignore:no curvature")


class Net(nn.Module):
    """A body, a head that may stay with its client, and an adapter beside the body."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(4, 2)
        self.body = nn.Linear(3, 4)
        self.down, self.up = nn.Linear(3, 2, bias=False), nn.Linear(2, 4, bias=False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(torch.tanh(self.body(x) + self.up(self.down(x))))
        return outputs


def batch_of(partition: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(partition)
    x = torch.randn(8 + 4 * partition, 3, dtype=torch.float64, generator=generator) * (1 + partition)
    return x, (x[:, 0] > 0).long()


def trained(model: nn.Module, partition: int, make: Callable[[nn.Module], torch.optim.Optimizer]) -> Any:
    optimizer = make(model)
    fit(model, [batch_of(partition)], optimizer, F.cross_entropy, steps=3)
    return optimizer


def foof(model: nn.Module) -> FOOF:
    return FOOF(model, lr=0.3, damping=0.1)


def app_of(
    load: Callable[[State], nn.Module],
    send: Callable[[nn.Module], State],
    make: Callable[[nn.Module], torch.optim.Optimizer] = foof,
    sends_curvature: Callable[[int], bool] = lambda partition: True,
) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(msg: Message, context: Context) -> Message:
        partition = messages.partition_of(context)[0]
        model = load(msg.content.array_records["arrays"].to_torch_state_dict())
        optimizer = trained(model, partition, make)
        content = RecordDict(
            {
                "arrays": ArrayRecord({**send(model)}),
                "metrics": MetricRecord({"num-examples": len(batch_of(partition)[0])}),
            }
        )
        if sends_curvature(partition):
            content["curvature"] = messages.curvature_record(optimizer, msg)
        return Message(content=content, reply_to=msg)

    return app


class _Given(nn.Module):
    """What ``federate`` starts from: these arrays."""

    def __init__(self, arrays: State) -> None:
        super().__init__()
        self.arrays = arrays

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return dict(self.arrays)


def rounds_of(
    app: ClientApp, arrays: State, rounds: int = 1, strategy: Strategy | None = None
) -> dict[str, Tensor]:
    chosen = strategy or FedPM(fraction_evaluate=0.0, codec="triangle-float64", max_failed_rounds=1)
    return dict(federate(app, chosen, _Given(arrays), CLIENTS, rounds).arrays.to_torch_state_dict())


def loaded(state: State) -> Net:
    model = Net()
    model.load_state_dict(state)
    return model


def by_hand(keys: Iterable[str], curved: Iterable[int] = range(CLIENTS)) -> dict[str, Tensor]:
    """One round with these parameters mixed, by a mixer of their own."""
    theta = {key: value for key, value in Net().state_dict().items() if key in set(keys)}
    mixer = ModelMixer(theta)
    for partition in range(CLIENTS):
        model = Net()
        layers = trained(model, partition, foof).preconditioners() if partition in curved else []
        if partition not in curved:
            trained(model, partition, lambda net: torch.optim.SGD(net.parameters(), lr=0.1))
        sent = [layer for layer in layers if set(layer.block.parameters) <= set(theta)]
        mixer.add(model.state_dict(), sent, len(batch_of(partition)[0]))
    return mixer.result()


def same(found: State, expected: State) -> None:
    assert set(found) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-11)


def prefixed(state: State, prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def bare(state: State, prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items()}


def compiled(model: nn.Module) -> nn.Module:
    wrapped: Any = torch.compile(model, backend="eager")
    assert isinstance(wrapped, nn.Module)
    return wrapped


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize(
    "wrap", [lambda net: net, nn.DataParallel, compiled], ids=["plain", "parallel", "compiled"]
)
def test_wrappers_are_no_matter_whatever_names_the_server_has(
    wrap: Callable[[nn.Module], nn.Module], prefix: str
) -> None:
    """The client trains the wrapper, and sends under the server's names, as it has to for Flower."""

    def load(state: State) -> nn.Module:
        return wrap(loaded(bare(state, prefix)))

    def send(model: nn.Module) -> State:
        inner = getattr(model, "module", getattr(model, "_orig_mod", model))
        return prefixed(inner.state_dict(), prefix)

    found = rounds_of(app_of(load, send), prefixed(Net().state_dict(), prefix))
    same(bare(found, prefix), by_hand(Net().state_dict()))
    torch.compiler.reset()


@pytest.mark.parametrize("codec", ["triangle-int8", "rank-1", "auto-0.9"])
def test_what_was_packed_for_the_step_is_sent_under_the_servers_names(codec: str) -> None:
    """In rounds of one step the optimizer has the codec, and what it stepped by is what travels."""

    def make(model: nn.Module) -> FOOF:
        return FOOF(model, lr=0.3, damping=0.1, codec=codec)

    def round_of(prefix: str) -> dict[str, Tensor]:
        app = app_of(
            lambda state: loaded(bare(state, prefix)), lambda model: prefixed(model.state_dict(), prefix), make
        )
        strategy = FedPM(fraction_evaluate=0.0, codec=codec, max_failed_rounds=1)
        return bare(rounds_of(app, prefixed(Net().state_dict(), prefix), strategy=strategy), prefix)

    same(round_of("module."), round_of(""))


def test_a_wrappers_names_that_the_server_does_not_know_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    app = app_of(lambda state: nn.DataParallel(loaded(state)), lambda model: model.state_dict())
    with pytest.raises(FailedRoundsError):
        rounds_of(app, Net().state_dict())
    assert re.search("its arrays are not those of the model; missing or extra: body.bias", caplog.text)


def test_the_order_of_arrays_is_no_matter() -> None:
    def backwards(state: State) -> dict[str, Tensor]:
        return dict(reversed(list(state.items())))

    found = rounds_of(app_of(loaded, lambda model: backwards(model.state_dict())), Net().state_dict())
    same(found, by_hand(Net().state_dict()))
    found = rounds_of(app_of(loaded, lambda model: model.state_dict()), backwards(Net().state_dict()))
    same(found, by_hand(Net().state_dict()))


@pytest.mark.parametrize("codec", ["triangle-float64", "auto-0.9"])
def test_a_head_that_stays_with_its_client_takes_no_part(codec: str) -> None:
    """Curvature is measured of the head too, which the optimizer trains; it is not sent."""
    body = [key for key in Net().state_dict() if not key.startswith("head.")]

    def load(state: State) -> nn.Module:
        model = Net()
        model.load_state_dict(state, strict=False)
        return model

    app = app_of(load, lambda model: {key: model.state_dict()[key] for key in body})
    given = {key: Net().state_dict()[key] for key in body}
    strategy = FedPM(fraction_evaluate=0.0, codec=codec, max_failed_rounds=1)
    found = rounds_of(app, given, strategy=strategy)
    if codec.startswith("triangle"):
        same(found, by_hand(body))
    assert set(found) == set(body)


def test_what_is_not_sent_is_said() -> None:
    """It may be meant so; or the names of an adapter may be others in its own state than in the model."""
    with pytest.warns(UserWarning, match="no curvature is sent of 'b', which are not among the arrays"):
        assert [found.block.parameters for found in in_names([layer("a"), layer("b")], "a")] == [("a",)]


def test_adapters_have_the_names_that_peft_sends_them_under() -> None:
    """Without the default adapter's own; in no other layer is a name with ``default`` in it touched."""
    sent = ["q.lora_A.weight", "q.lora_B.weight", "head.weight", "q.default.weight"]
    inside = ["q.lora_A.default.weight", "q.lora_B.default.weight", "head.modules_to_save.default.weight", sent[3]]
    found = in_names([layer(name) for name in inside], sent)
    assert [one.block.parameters for one in found] == [(name,) for name in sent]
    with pytest.warns(UserWarning, match="no curvature is sent of 'q.lora_A.other.weight', 'b.default.weight'"):
        assert (
            len(in_names(map(layer, ["q.lora_A.other.weight", "b.default.weight", sent[0]]), [*sent, "b.weight"]))
            == 1
        )


@pytest.mark.parametrize("only", ["adapters", "whole model"])
def test_adapters_beside_a_frozen_model(only: str, caplog: pytest.LogCaptureFixture) -> None:
    """LoRA: what is frozen has no curvature, whether it is exchanged or not; adapters are mixed alike."""

    def load(state: State) -> nn.Module:
        model = Net()
        model.requires_grad_(False)
        model.load_state_dict(state, strict=only != "adapters")
        model.up.requires_grad_(True)
        model.down.requires_grad_(True)
        return model

    keys = [key for key in Net().state_dict() if only != "adapters" or key.split(".")[0] in ("up", "down")]
    app = app_of(load, lambda model: {key: model.state_dict()[key] for key in keys})
    found = rounds_of(app, {key: Net().state_dict()[key] for key in keys}, rounds=2)
    expected = rounds_of(app_of(load, lambda model: model.state_dict()), Net().state_dict(), rounds=2)
    if only == "adapters":
        same(found, {key: expected[key] for key in keys})
    else:
        torch.testing.assert_close(found["body.weight"], Net().body.weight.detach(), rtol=1e-15, atol=0)
        assert not torch.equal(found["up.weight"], Net().up.weight)
    assert "no reply held curvature" not in caplog.text


@pytest.mark.parametrize(
    ("make", "keys", "reason"),
    [
        (
            foof,
            ("body.weight",),
            r"layer 'body': the server has sent only some of its parameters, not 'body.bias'",
        ),
        (
            lambda model: Newton(model, lr=0.1, damping=1.0, max_factor_side=100),
            ("body.weight", "body.bias"),
            r"layer 'model': the server has sent only some of its parameters, not 'head.weight', 'head.bias', "
            r"'down.weight' and 1 more",
        ),
        (
            lambda model: foof(model.body),
            ("head.weight", "head.bias"),
            r"none of the optimizer's layers is among the arrays that the server has sent: it has curvature of "
            r"'weight', 'bias'; the arrays are 'head.weight', 'head.bias'",
        ),
        (
            lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
            ("body.weight", "body.bias"),
            "SGD has no curvature to send: take an optimizer of fedpm_flwr.optim itself",
        ),
    ],
    ids=["a weight without its bias", "part of a whole matrix", "names of a submodule", "another optimizer"],
)
def test_what_does_not_fit_is_said(
    make: Callable[[nn.Module], torch.optim.Optimizer],
    keys: tuple[str, ...],
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def load(state: State) -> nn.Module:
        model = Net()
        model.load_state_dict(state, strict=False)
        return model

    app = app_of(load, lambda model: {key: model.state_dict()[key] for key in keys}, make)
    with pytest.raises(FailedRoundsError):
        rounds_of(app, {key: Net().state_dict()[key] for key in keys})
    assert re.search(reason, caplog.text)


@pytest.mark.parametrize("curved", [{0, 1}, {2}, set()])
def test_plain_clients_beside_clients_with_curvature(curved: set[int], caplog: pytest.LogCaptureFixture) -> None:
    """Those with curvature are mixed, and the result is averaged with the others by weight, layer by layer."""
    app, plain = (
        app_of(loaded, lambda model: model.state_dict(), make, lambda partition: partition in curved)
        for make in (foof, lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    )
    both = ClientApp()

    @both.train()
    def train(msg: Message, context: Context) -> Message:
        chosen = app if messages.partition_of(context)[0] in curved else plain
        return chosen(msg, context)

    found = rounds_of(both, Net().state_dict())
    same(found, by_hand(Net().state_dict(), curved))
    states, weights = [], []
    for partition in range(CLIENTS):
        model = Net()
        make: Any = foof if partition in curved else lambda net: torch.optim.SGD(net.parameters(), lr=0.1)
        trained(model, partition, make)
        states.append(model.state_dict())
        weights.append(len(batch_of(partition)[0]))
    average = sum(w * state["head.weight"] for w, state in zip(weights, states, strict=True)) / sum(weights)
    is_average = torch.allclose(found["head.weight"], average, rtol=1e-9)
    assert is_average == (len(curved) < 2)  # one that is mixed alone is itself
    assert ("no reply held curvature; models are averaged" in caplog.text) == (not curved)


def test_half_precision_uploads_are_taken_in_the_models_own() -> None:
    app = app_of(loaded, lambda model: {key: value.half() for key, value in model.state_dict().items()})
    found = rounds_of(app, Net().state_dict())
    for key, value in by_hand(Net().state_dict()).items():
        assert found[key].dtype == torch.float64
        torch.testing.assert_close(found[key], value, rtol=5e-3, atol=5e-3)
        assert not torch.equal(found[key], value)


def test_half_precision_uploads_that_overflow_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    app = app_of(loaded, lambda model: {key: (1e6 * value).half() for key, value in model.state_dict().items()})
    with pytest.raises(FailedRoundsError):
        rounds_of(app, Net().state_dict())
    assert re.search("array '[a-z.]*' is not finite", caplog.text)


def layer(*parameters: str, copies: tuple[tuple[str, str], ...] = ()) -> LayerCurvature:
    return LayerCurvature(Block("layer", parameters, copies), KroneckerRight(torch.eye(2)), 0.1)


def test_of_tied_parameters_one_name_is_enough() -> None:
    tied = layer("a", copies=(("b", "a"), ("c", "a")))
    for names, expected in (
        ("abc", Block("", ("a",), (("b", "a"), ("c", "a")))),
        ("ac", Block("", ("a",), (("c", "a"),))),
        ("cb", Block("", ("b",), (("c", "b"),))),
        ("c", Block("", ("c",))),
    ):
        assert [found.block for found in in_names([tied], names)] == [expected]


def test_prefixes_that_tell_two_arrays_apart_are_not_passed_over() -> None:
    names = ["weight", "module.weight"]
    for name in names:
        assert [found.block.parameters for found in in_names([layer(name)], names)] == [(name,)]
    with pytest.raises(ValueError, match="none of the optimizer's layers"):
        in_names([layer("_orig_mod.weight")], names)


def test_without_a_step_there_is_nothing_to_name() -> None:
    assert in_names([], ["weight"]) == []


def test_clients_that_only_evaluate_are_left_out_of_training(caplog: pytest.LogCaptureFixture) -> None:
    good = app_of(loaded, lambda model: model.state_dict())
    evaluating, both = ClientApp(), ClientApp()

    @evaluating.evaluate()
    def evaluate(msg: Message, context: Context) -> Message:
        return messages.metrics_reply(msg, {"num-examples": 1, "loss": 2.0})

    @both.train()
    def train(msg: Message, context: Context) -> Message:
        return (evaluating if messages.partition_of(context)[0] == 0 else good)(msg, context)

    both.evaluate()(evaluate)
    result = federate(both, FedPM(codec="triangle-float64"), Net(), CLIENTS)
    assert result.evaluate_metrics_clientapp[1]["loss"] == 2.0
    assert caplog.text.count("left out the reply") == 1
    assert "No train function registered" in caplog.text
    assert not torch.equal(result.arrays.to_torch_state_dict()["up.weight"], Net().up.weight)


def test_a_submodule_is_trained_by_naming_its_parameters() -> None:
    """The optimizer is given the model whose names are sent, and the parameters to train."""

    def make(model: nn.Module) -> SecondOrder:
        assert isinstance(model, Net)
        return FOOF(model, model.body.parameters(), lr=0.3, damping=0.1)

    found = rounds_of(app_of(loaded, lambda model: model.state_dict(), make), Net().state_dict())
    assert not torch.equal(found["body.weight"], Net().body.weight)
    torch.testing.assert_close(found["head.weight"], Net().head.weight.detach(), rtol=1e-15, atol=0)


class Twice(nn.Module):
    """Two layers of one shape, called ``fc`` in the model and in its encoder."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enc = nn.Sequential(OrderedDict(fc=nn.Linear(3, 3), out=nn.Tanh()))
        self.fc = nn.Linear(3, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.fc(self.enc(x))
        return outputs


def encoders(state: State) -> dict[str, Tensor]:
    return {key.removeprefix("enc."): value for key, value in state.items() if key.startswith("enc.")}


@pytest.mark.parametrize(
    ("part", "make", "reason"),
    [
        (dict, lambda model: foof(model.enc), "has sent 'enc.fc.weight', 'enc.fc.bias', which the optimizer's"),
        (encoders, foof, "has sent, 'fc.weight', 'fc.bias', may be the model's or those of its part 'enc'"),
    ],
    ids=["the optimizer has the encoder", "the encoder's own names are sent"],
)
def test_curvature_of_another_layer_of_that_name_and_shape_is_refused(
    part: Callable[[State], State],
    make: Callable[[nn.Module], torch.optim.Optimizer],
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def load(state: State) -> nn.Module:
        model = Twice()
        (model if part is dict else model.enc).load_state_dict(state)
        return model

    with pytest.raises(FailedRoundsError):
        rounds_of(app_of(load, lambda model: part(model.state_dict()), make), part(Twice().state_dict()))
    assert caplog.text.count(reason) == CLIENTS


def test_of_two_layers_of_one_name_each_is_sent_under_its_own() -> None:
    """The way that the message names: the model, and which of its parameters to train."""

    def load(state: State) -> nn.Module:
        (model := Twice()).load_state_dict(state)
        return model

    def make(model: nn.Module) -> SecondOrder:
        assert isinstance(model, Twice)
        return FOOF(model, model.enc.parameters(), lr=0.3, damping=0.1)

    app, watching, sent = app_of(load, lambda model: model.state_dict(), make), ClientApp(), set[tuple[str, ...]]()

    @watching.train()
    def train(msg: Message, context: Context) -> Message:
        reply = app(msg, context)
        payload = reply.content.config_records["curvature"][messages.PAYLOAD]
        assert isinstance(payload, bytes)
        shapes = {key: value.shape for key, value in Twice().state_dict().items()}
        sent.update(one.block.parameters for one in decode(payload, shapes))
        return reply

    found = rounds_of(watching, Twice().state_dict())
    assert sent == {("enc.fc.weight", "enc.fc.bias")}
    assert not torch.equal(found["enc.fc.weight"], Twice().state_dict()["enc.fc.weight"])


def shaped(*names: str, size: int = 2) -> dict[str, Tensor]:
    return dict.fromkeys(names, torch.empty(size, device="meta"))


def test_names_of_a_part_that_no_other_part_has_are_the_models() -> None:
    model = shaped("fc.w", "enc.fc.w", "enc.b") | shaped("deep.enc.fc.w", size=3)
    for part in ("enc.fc.w", "enc.b"), ("fc.w", "enc.b"), tuple(model), ("module.enc._orig_mod.fc.w",):
        sent = {name: model.get(name, model["enc.fc.w"]) for name in part}
        check_names(sent, model)  # the deep one is of another shape
    with pytest.raises(ValueError, match=r"has sent, 'fc\.w', may be the model's or those of its part 'enc'"):
        check_names(shaped("fc.w"), model)
    with pytest.raises(ValueError, match=r"has sent 'fc\.w', which the optimizer's model does not have"):
        check_names(shaped("fc.w", size=3), model)


def test_all_kinds_of_adapters_are_found_in_the_names_that_peft_sends() -> None:
    """Without the adapter's name, which stands last in some; and DoRA's without ``weight``."""
    inside = ["q.lora_A.default.weight", "q.lora_magnitude_vector.default.weight", "e.lora_embedding_A.default"]
    sent = ["q.lora_A.weight", "q.lora_magnitude_vector", "e.lora_embedding_A"]
    check_names(shaped(*sent), shaped(*inside, "q.base_layer.weight"))
    with pytest.raises(ValueError, match=r"has sent 'v\.lora_A\.weight'"):
        check_names(shaped(*sent, "v.lora_A.weight"), shaped(*inside))


def test_prefixes_that_tell_two_of_the_models_arrays_apart_are_not_passed_over() -> None:
    """A module called ``module`` is no wrapper."""
    own = ["module.fc.weight", "fc.weight"]
    with pytest.raises(ValueError, match="none of the optimizer's layers"):
        in_names([layer("module.fc.weight")], ["fc.weight"], own)
    check_names(shaped("module.fc.weight"), shaped(*own))
    with pytest.raises(ValueError, match="may be the model's or those of its part 'module'"):
        check_names(shaped("fc.weight"), shaped(*own))
