"""Data sets by name. A new one is one loader and one line in ``_LOADERS``."""

import logging
from collections.abc import Callable
from functools import lru_cache, partial

import torch

from ..extras import needs
from . import files, vision
from .examples import Split, hold_out, with_validation

_log = logging.getLogger("flwr")


@lru_cache(maxsize=2)
def load_dataset(name: str, max_train_examples: int = 0, validation_share: float = 0.0) -> Split:
    """A data set, loaded once per process; with only the first so many training examples (0: all).

    With a ``validation_share`` this share of them, always the same ones, takes the place of the test set.

    Raises:
        KeyError: the name is neither one of ``config.DATASETS`` nor one of ``config.FILES`` with a path.
        DataError: the data is missing, malformed or mislabelled.
    """
    prefix, colon, path = name.partition(":")
    whole = files.LOADERS[prefix](path) if colon else _LOADERS[name]()
    split = Split(whole.train.first(max_train_examples), whole.test, whole.classes)
    if validation_share:
        split = with_validation(split, validation_share)
    _log.info("read %s: %d training and %d test examples", name, len(split.train), len(split.test))
    return split


def _digits() -> Split:
    """scikit-learn's digits: 1,797 images 8 × 8 of 10 classes, scaled to 0 … 1."""
    # Here, not on top, and so in this package: each message of a deployment starts a process that imports anew.
    with needs("tasks"):
        from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(images / 16.0, dtype=torch.float32).reshape(-1, 1, 8, 8)
    return hold_out(inputs, torch.tensor(labels, dtype=torch.int64), classes=10)


def _breast_cancer() -> Split:
    """scikit-learn's breast cancer: 569 examples of 30 features and 2 classes.

    Features are standardised by the mean and deviation of the training examples.
    """
    with needs("tasks"):
        from sklearn.datasets import load_breast_cancer

    features, labels = load_breast_cancer(return_X_y=True)
    inputs = torch.tensor(features, dtype=torch.float64)
    train = hold_out(inputs, torch.tensor(labels), classes=2).train.inputs
    inputs = (inputs - train.mean(dim=0)) / train.std(dim=0, correction=0)
    return hold_out(inputs.float(), torch.tensor(labels, dtype=torch.int64), classes=2)


_LOADERS: dict[str, Callable[[], Split]] = {
    "digits": _digits,
    "breast-cancer": _breast_cancer,
    **{name: partial(vision.load_vision, name) for name in vision.NAMES},
}
