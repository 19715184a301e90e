"""Labelled examples in memory, read a batch at a time."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..extras import needs

_PADDING = 4
"""How far a crop may be moved, in pixels: as is usual for CIFAR."""

Labels = np.ndarray[tuple[int], np.dtype[np.int64]]


class DataError(ValueError):
    """Data that is missing, malformed or mislabelled; names the data set and the place."""


@dataclass(frozen=True, eq=False)
class Examples(Dataset[tuple[Tensor, Tensor]]):
    """Inputs and their labels; ``examples[i]`` is one pair, ``examples[[i, j]]`` a batch.

    Args:
        inputs: float32 [examples, …] or characters' numbers, int64 [examples, length], given out as they
            are; or uint8 images [examples, channels, height, width], scaled from 0 … 255 to −1 … 1 when
            they are read: in memory a fourth.
        labels: int64 [examples], from 0 to the number of classes − 1.
        augment: whether images are moved by up to 4 pixels and mirrored at random when they are
            read (torch's generator), as is usual for CIFAR.

    Raises:
        DataError: ``augment`` is asked for where there are no images.
    """

    inputs: Tensor
    labels: Tensor
    augment: bool = False
    _transform: Callable[[Tensor], Tensor] | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_transform", _augmentation(self.input_shape) if self.augment else None)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | Sequence[int]) -> tuple[Tensor, Tensor]:
        inputs = self.inputs[index]
        if self._transform is not None:
            single = inputs.dim() < self.inputs.dim()
            inputs = self._transform(inputs) if single else torch.stack([self._transform(one) for one in inputs])
        if inputs.dtype == torch.uint8:
            inputs = inputs.float() / 127.5 - 1.0
        return inputs, self.labels[index]

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.inputs.shape[1:])

    @property
    def input_dtype(self) -> torch.dtype:
        """The type of the inputs as they are given out."""
        return torch.float32 if self.inputs.dtype == torch.uint8 else self.inputs.dtype

    def augmented(self) -> "Examples":
        """The same examples, augmented when they are read."""
        return replace(self, augment=True)

    def at(self, places: Tensor) -> "Examples":
        """The examples at these places, int64."""
        return replace(self, inputs=self.inputs[places], labels=self.labels[places])

    def first(self, count: int) -> "Examples":
        """The first so many of them; 0: all."""
        return replace(self, inputs=self.inputs[:count], labels=self.labels[:count]) if count else self


@dataclass(frozen=True)
class Form:
    """What inputs and labels look like: all that a model has to know of the data."""

    input_shape: tuple[int, ...]
    input_dtype: torch.dtype
    classes: int

    def to_text(self) -> str:
        """For a request's config."""
        dtype = str(self.input_dtype).removeprefix("torch.")
        return json.dumps({"input-shape": self.input_shape, "input-dtype": dtype, "classes": self.classes})

    @classmethod
    def from_text(cls, text: str) -> "Form":
        """What ``to_text`` has made.

        Raises:
            ValueError: it is something else.
        """
        try:
            parts = json.loads(text)
            shape = tuple(int(side) for side in parts["input-shape"])
            return cls(shape, getattr(torch, parts["input-dtype"]), int(parts["classes"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not the form of a data set: {text!r:.100}") from error


@dataclass(frozen=True, eq=False)
class Split:
    """A data set: what clients train on, what the server tests on, and the number of classes."""

    train: Examples
    test: Examples
    classes: int

    @property
    def train_labels(self) -> Labels:
        return self.train.labels.numpy()

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.train.input_shape

    @property
    def input_dtype(self) -> torch.dtype:
        return self.train.input_dtype

    @property
    def form(self) -> Form:
        return Form(self.input_shape, self.input_dtype, self.classes)


def hold_out(inputs: Tensor, labels: Tensor, classes: int, every: int = 5) -> Split:
    """Every fifth example for testing, the others for training."""
    test = torch.arange(len(labels)) % every == 0
    return Split(Examples(inputs[~test], labels[~test]), Examples(inputs[test], labels[test]), classes)


def with_validation(split: Split, share: float) -> Split:
    """This share of the training examples (at least one is left on each side) in place of the test set.

    Raises:
        DataError: there is but one training example.
    """
    count = len(split.train)
    if count < 2:
        raise DataError(f"validation-share={share}: there are {count} training examples to share")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    held = min(max(round(share * count), 1), count - 1)
    test, train = (split.train.at(part.sort().values) for part in (order[:held], order[held:]))
    return replace(split, train=train, test=test)


def require_file(path: str) -> None:
    """Raises DataError, saying what there is instead, unless the path is a file's."""
    if Path(path).is_dir():
        raise DataError(f"{path}: a folder, not a file")
    if not Path(path).is_file():
        raise DataError(f"{path}: there is no such file on this machine")


def _augmentation(shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    if len(shape) != 3:
        raise DataError(f"augment=true is for images [channels, height, width], not inputs of shape {list(shape)}")
    # Here, not on top: torchvision takes a second to import.
    with needs("tasks"):
        from torchvision.transforms import v2

    transform: Callable[[Tensor], Tensor] = v2.Compose(
        [v2.RandomCrop(shape[1:], padding=_PADDING), v2.RandomHorizontalFlip()]
    )
    return transform
