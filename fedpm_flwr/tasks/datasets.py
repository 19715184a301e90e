"""Data sets by name. A new one is one loader and one line in ``_LOADERS``."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import TensorDataset

_DIGITS_TEST_EVERY = 5


@dataclass(frozen=True, eq=False)
class Split:
    """Inputs as float32 [examples, …], labels as int64 [examples]; the number of classes."""

    train: TensorDataset
    test: TensorDataset
    classes: int

    @property
    def train_labels(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        labels: Tensor = self.train.tensors[1]
        return labels.numpy()

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.train.tensors[0].shape[1:])


@lru_cache(maxsize=2)
def load_dataset(name: str) -> Split:
    """A data set, loaded once per process.

    Raises:
        KeyError: the name is not one of ``config.DATASETS``.
    """
    return _LOADERS[name]()


def _digits() -> Split:
    """scikit-learn's digits: 1,797 images 8 × 8 of 10 classes; every fifth is held out for testing."""
    images, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(images / 16.0, dtype=torch.float32).reshape(-1, 1, 8, 8)
    targets = torch.tensor(labels, dtype=torch.int64)
    test = torch.arange(len(targets)) % _DIGITS_TEST_EVERY == 0
    return Split(
        train=TensorDataset(inputs[~test], targets[~test]),
        test=TensorDataset(inputs[test], targets[test]),
        classes=10,
    )


_LOADERS: dict[str, Callable[[], Split]] = {"digits": _digits}
