"""A model of every kind of layer in a real round: what has curvature is mixed, the rest averaged, ties hold."""

import pytest
import torch
import torch.nn.functional as F
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from fedpm_flwr import messages
from fedpm_flwr.curvature import Diagonal, KroneckerRight, LayerCurvature
from fedpm_flwr.mixing import ModelMixer
from fedpm_flwr.optim import FOOF
from fedpm_flwr.strategy import FedPM
from fedpm_flwr.training import fit

from .apps import federate
from .helpers import relative_error

VOCABULARY, LENGTH, WIDTH, CLASSES = 7, 6, 8, 3
SIZES = [5, 9]


class EveryLayer(nn.Module):
    """Characters [batch, LENGTH] to classes, by way of all that has, or has not, curvature."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.depthwise = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH, padding_mode="circular")
        self.norm = nn.BatchNorm1d(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.spread = nn.Conv2d(1, 2, 3, padding="same", dilation=2)
        self.volume = nn.Conv3d(2, 2, (1, 2, 2), stride=(1, 2, 2), groups=2, bias=False)
        self.first = nn.Linear(LENGTH * WIDTH // 2, LENGTH * WIDTH // 2, bias=False)
        self.twin = nn.Linear(LENGTH * WIDTH // 2, LENGTH * WIDTH // 2, bias=False)
        self.twin.weight = self.first.weight
        self.head = nn.Linear(LENGTH * WIDTH // 2, CLASSES)

    def forward(self, characters: Tensor) -> Tensor:
        x = self.norm(self.depthwise(self.embedding(characters).mT)).mT
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.spread(x[:, None])
        x = self.volume(x[:, :, None]).flatten(1)
        outputs: Tensor = self.head(torch.tanh(self.twin(torch.tanh(self.first(x)))))
        return outputs


def make_model() -> EveryLayer:
    torch.manual_seed(0)
    return EveryLayer().double()


def client_data(partition: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(partition)
    shape = (SIZES[partition], LENGTH)
    characters = torch.randint(0, VOCABULARY - partition, shape, generator=generator)
    return characters, characters.sum(dim=1) % CLASSES


def trained(model: nn.Module, partition: int) -> FOOF:
    optimizer = FOOF(model, lr=0.1, damping=0.1)
    fit(model, [client_data(partition)], optimizer, F.cross_entropy, steps=2)
    return optimizer


@pytest.mark.filterwarnings("ignore:no curvature for")
def test_a_round_with_every_kind_of_layer() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        partition = messages.partition_of(context)[0]
        model = make_model()
        model.load_state_dict(message.content.array_records[messages.ARRAYS].to_torch_state_dict())
        optimizer = trained(model, partition)
        return messages.train_reply(message, model, {"num-examples": SIZES[partition]}, optimizer)

    result = federate(app, FedPM(codec="triangle-float64"), make_model(), len(SIZES))
    found = result.arrays.to_torch_state_dict()

    theta = {key: value.clone() for key, value in make_model().state_dict().items()}
    mixer = ModelMixer(theta)
    states, told = [], []
    for partition, weight in enumerate(SIZES):
        model = make_model()
        told.append(trained(model, partition).preconditioners())
        states.append(model.state_dict())
        mixer.add(states[-1], told[-1], weight)
    expected = mixer.result()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-12)
    assert torch.equal(found["twin.weight"], found["first.weight"])
    assert_kinds(told[0])

    def average(key: str) -> Tensor:
        total: Tensor = SIZES[0] * states[0][key] + SIZES[1] * states[1][key]
        return total / sum(SIZES)

    for key in ("norm.weight", "norm.running_mean", "norm.running_var", "attention.out_proj.weight"):
        torch.testing.assert_close(found[key], average(key))
    for key in (
        "embedding.weight",
        "depthwise.weight",
        "attention.in_proj_weight",
        "volume.weight",
        "first.weight",
    ):
        assert relative_error(found[key], average(key)) > 1e-4, f"{key} is averaged, not mixed"


def assert_kinds(layers: list[LayerCurvature]) -> None:
    found = {layer.block.name: {k: tuple(v.shape) for k, v in layer.curvature.parts().items()} for layer in layers}
    half = LENGTH * WIDTH // 2
    assert found == {
        "embedding": {"values": (VOCABULARY, 1)},
        "depthwise": {"factor": (WIDTH, 4, 4)},
        "attention": {"factor": (WIDTH + 1, WIDTH + 1)},
        "spread": {"factor": (10, 10)},
        "volume": {"factor": (2, 4, 4)},
        "first": {"factor": (half, half)},
        "head": {"factor": (half + 1, half + 1)},
    }
    assert all(isinstance(layer.curvature, Diagonal | KroneckerRight) for layer in layers)
