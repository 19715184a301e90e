"""The data of one site of a deployment: ``data-path`` in the configuration of its SuperNode.

    python -m fedpm_flwr.tasks PATH

says what is there, or what is wrong with it, before a node is started.
"""

import os
from functools import lru_cache
from pathlib import Path

import torch

from .examples import DataError, Examples, Form
from .files import read_npz
from .folders import read_folder


@lru_cache(maxsize=2)
def site_data(path: str, form: Form | None = None) -> Examples:
    """A site's training examples, checked against what the model takes; read once per process.

    A .npz file with x_train and y_train (``files.load_npz``), or a folder with a subfolder for each of the
    model's classes (``folders.read_folder``), empty where the site has none of them.

    Raises:
        DataError: naming the file, and what is wrong with it or does not fit the model.
    """
    if not Path(path).is_absolute():
        raise DataError(f"data-path={path!r} is not an absolute path")
    if not os.access(path, os.R_OK):
        there = Path(path).exists()
        raise DataError(f"data-path={path!r}: {'not readable by this user' if there else 'there is nothing here'}")
    if Path(path).is_dir():
        examples, classes = read_folder(path)
        if form and len(classes) != form.classes:
            raise DataError(
                f"{path}: {len(classes)} folders of classes, where the model has {form.classes} classes: a site "
                f"needs one for each, empty where it has no images; here are {', '.join(classes[:20])}"
            )
    elif path.endswith(".npz"):
        examples = read_npz(path)
    else:
        raise DataError(f"data-path={path!r}: neither a folder of images nor a .npz file")
    return _fitting(path, examples, form) if form else examples


def _fitting(path: str, examples: Examples, form: Form) -> Examples:
    if examples.input_shape != form.input_shape:
        raise DataError(
            f"{path}: its inputs are {list(examples.input_shape)}, where the model takes {list(form.input_shape)}"
        )
    if examples.input_dtype != form.input_dtype:
        raise DataError(f"{path}: its inputs are {examples.input_dtype}, where the model takes {form.input_dtype}")
    largest = int(examples.labels.max())
    if largest >= form.classes:
        place = int(examples.labels.argmax())
        raise DataError(
            f"{path}: the label {largest}, first in row {place}; those of the model end at {form.classes - 1}"
        )
    return examples


def describe(path: str) -> str:
    """One line for an operator: how many examples of which form, and of which labels.

    Raises:
        DataError: as ``site_data``.
    """
    examples = site_data(path)
    labels = ", ".join(f"{label}: {count}" for label, count in enumerate(torch.bincount(examples.labels)) if count)
    kind = "uint8 images" if examples.inputs.dtype == torch.uint8 else str(examples.inputs.dtype)
    return f"{path}: {len(examples)} examples, inputs {list(examples.input_shape)} ({kind}), by label {labels}"
