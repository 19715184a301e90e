"""Models by name. A new one is one function and one line in ``_MODELS``."""

import copy
import math
from collections.abc import Callable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..extras import needs
from .examples import DataError, require_file
from .vit import PATCH, VisionTransformer

_HIDDEN = 64
_GROUPS = 32
_EMBEDDING = 32


def build_model(
    name: str, input_shape: tuple[int, ...], classes: int, seed: int, input_dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A freshly initialised model: the same for the same seed.

    Raises:
        KeyError: the name is not one of ``config.MODELS``.
        ValueError: the model cannot take inputs of this shape and type.
    """
    is_text = not input_dtype.is_floating_point
    if is_text != (name in _FOR_TEXT):
        fitting = ", ".join(other for other in _MODELS if is_text == (other in _FOR_TEXT))
        given = "text" if is_text else "features or images"
        raise ValueError(f"model={name!r} does not take {given} ({input_dtype}); models that do: {fitting}")
    with torch.random.fork_rng(devices=[]):  # models are made on the CPU; see ``training.reproducible``
        torch.default_generator.manual_seed(seed)
        return _MODELS[name](input_shape, classes)


def load_weights(model: nn.Module, path: str) -> None:
    """Load a .safetensors file into the model, names and shapes being the model's own.

    Raises:
        DataError: naming the file, the tensor and what is wrong with it.
    """
    require_file(path)
    try:
        weights = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path}: not a safetensors file: {error}") from error
    expected = model.state_dict()
    odd = sorted(set(weights) ^ set(expected))
    if odd:
        raise DataError(f"{path}: its tensors are not those of the model; missing or extra: {', '.join(odd[:5])}")
    for key, old in expected.items():
        new = weights[key]
        if new.shape != old.shape or new.is_floating_point() != old.is_floating_point():
            raise DataError(f"{path}: {key!r} is {new.dtype} {list(new.shape)}, not {old.dtype} {list(old.shape)}")
        if not torch.isfinite(new.to(old.dtype)).all():
            raise DataError(f"{path}: {key!r} is not finite")
    model.load_state_dict(weights)


def load_reference(model: nn.Module, path: str) -> nn.Module:
    """A copy of the model with the weights of a .safetensors file.

    Raises:
        DataError: as ``load_weights``.
    """
    reference = copy.deepcopy(model)
    load_weights(reference, path)
    return reference


@torch.no_grad()
def distance(model: nn.Module, reference: nn.Module) -> float:
    """‖θ − θ*‖ over all parameters."""
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    return float(torch.linalg.vector_norm(torch.stack([(p - q).norm() for p, q in pairs])))


def _linear(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Multinomial logistic regression, on inputs of any shape."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), classes))


class Logistic(nn.Module):
    """Binary logistic regression, θ of d entries: outputs [0, θᵀx], whose cross-entropy is log(1 + exp(∓θᵀx))."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.theta = nn.Linear(features, 1, bias=False)
        nn.init.zeros_(self.theta.weight)  # where the convex literature starts

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.pad(self.theta(inputs.flatten(1)), (1, 0))


def _logistic(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Binary logistic regression without a bias, from θ = 0."""
    if classes != 2:
        raise ValueError(f"model='logistic' is for 2 classes, not {classes}; 'linear' takes any number")
    return Logistic(math.prod(input_shape))


def _mlp(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """One hidden layer of 64 units, on inputs of any shape."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(math.prod(input_shape), _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, classes)
    )


def _lenet(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """LeNet-5 (LeCun et al. 1998) with ReLU and max pooling: 6 and 16 channels, 120 and 84 units."""
    channels, height, width = _image("lenet", input_shape, least=16)
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * (((height - 4) // 2 - 4) // 2) * (((width - 4) // 2 - 4) // 2), 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, classes),
    )


def _cnn(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Two convolutions 3 × 3 with pooling, two fully connected layers."""
    channels, height, width = _image("cnn", input_shape, least=4)
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (height // 4) * (width // 4), _HIDDEN),
        nn.ReLU(),
        nn.Linear(_HIDDEN, classes),
    )


def _resnet18_gn(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """torchvision's ResNet18 with GroupNorm (32 groups), whose statistics no client has to share.

    Its stem is the one usual for CIFAR: a convolution 3 × 3 of stride 1, and no pooling.
    """
    channels, _, _ = _image("resnet18-gn", input_shape, least=8)
    # Here, not on top: torchvision takes a second to import.
    with needs("tasks"):
        from torchvision.models import resnet18

    model: nn.Module = resnet18(num_classes=classes, norm_layer=lambda width: nn.GroupNorm(_GROUPS, width))
    model.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision does
    model.maxpool = nn.Identity()
    return model


def _vit(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """A small vision transformer, patches 4 × 4; see ``VisionTransformer``."""
    channels, height, width = _image("vit", input_shape, least=2 * PATCH)
    if height % PATCH or width % PATCH:
        raise ValueError(
            f"model='vit' takes images whose sides are multiples of {PATCH}, not inputs of shape {input_shape}"
        )
    return VisionTransformer(channels, height, width, classes)


def _char_lm(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """The next character from those before it, [batch, length]: two convolutions of 3 on embedded characters."""
    (length,) = input_shape
    return nn.Sequential(
        nn.Embedding(classes, _EMBEDDING),
        _ChannelsFirst(),
        nn.Conv1d(_EMBEDDING, _HIDDEN, 3, padding=1),
        nn.ReLU(),
        nn.Conv1d(_HIDDEN, _HIDDEN, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),  # not the mean: which character comes next depends most on the last ones
        nn.Linear(_HIDDEN * length, classes),
    )


class _ChannelsFirst(nn.Module):
    """[batch, length, channels] as [batch, channels, length], as convolutions take it."""

    def forward(self, embedded: Tensor) -> Tensor:
        return embedded.transpose(1, 2)


def _image(model: str, shape: tuple[int, ...], least: int) -> tuple[int, int, int]:
    """The shape as channels, height, width."""
    if len(shape) != 3 or min(shape[1:]) < least:
        raise ValueError(
            f"model={model!r} takes images of at least {least} x {least}, not inputs of shape {shape}"
        )
    return shape


_MODELS: dict[str, Callable[[tuple[int, ...], int], nn.Module]] = {
    "linear": _linear,
    "logistic": _logistic,
    "mlp": _mlp,
    "lenet": _lenet,
    "cnn": _cnn,
    "resnet18-gn": _resnet18_gn,
    "vit": _vit,
    "char-lm": _char_lm,
}
_FOR_TEXT = ("char-lm",)
"""The models of ``_MODELS`` that take characters' numbers, int64; all others take floating point."""
