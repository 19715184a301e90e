"""Data from the user's own files: NumPy's .npz and LIBSVM's text format; text is in ``text``."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..extras import needs
from .examples import DataError, Examples, Split, hold_out, require_file
from .folders import load_folder
from .text import load_text

_ARRAYS = ("x_train", "y_train", "x_test", "y_test")
_CHANNELS = (1, 3, 4)
_MAX_DENSE_BYTES = 8 << 30

Array = np.ndarray[Any, Any]


def load_npz(path: str) -> Split:
    """x_train, y_train, x_test, y_test of a .npz file.

    Inputs are features [n, d] or images: [n, height, width], [n, height, width, channels] or
    [n, channels, height, width] with 1, 3 or 4 channels (channels last if both fit). uint8 images
    are scaled to −1 … 1; all else is taken as it is, as float32. Labels are whole numbers from 0
    to the number of classes − 1, [n] or [n, 1].

    Raises:
        DataError: naming the file, the array and what is wrong with it.
    """
    arrays = _read_npz(path, _ARRAYS)
    inputs = {part: _inputs(path, f"x_{part}", arrays[f"x_{part}"]) for part in ("train", "test")}
    labels = {part: _labels(path, f"y_{part}", arrays[f"y_{part}"]) for part in ("train", "test")}
    for part in ("train", "test"):
        _same_length(path, part, inputs[part], labels[part])
    _same_form(path, inputs["train"], inputs["test"])
    classes = _count_classes(path, labels["train"], labels["test"])
    return Split(Examples(inputs["train"], labels["train"]), Examples(inputs["test"], labels["test"]), classes)


def read_npz(path: str) -> Examples:
    """x_train and y_train alone, as ``load_npz`` reads them; not all labels need to occur.

    Raises:
        DataError: naming the file, the array and what is wrong with it.
    """
    arrays = _read_npz(path, _ARRAYS[:2])
    inputs, labels = _inputs(path, "x_train", arrays["x_train"]), _labels(path, "y_train", arrays["y_train"])
    _same_length(path, "train", inputs, labels)
    return Examples(inputs, labels)


def load_libsvm(path: str) -> Split:
    """A LIBSVM file; PATH.t, if it exists, is the test set, else every fifth example.

    A packed PATH.bz2 or PATH.gz has its test set in PATH.t.bz2 or PATH.t.gz.

    Labels are whole numbers, such as −1 and 1; in their order they become 0, 1, …

    Raises:
        DataError: naming the file and what is wrong with it.
    """
    with needs("tasks"):
        from sklearn.datasets import load_svmlight_file, load_svmlight_files

    require_file(path)
    whole = Path(path)
    packed = whole.suffix if whole.suffix in (".bz2", ".gz") else ""
    test = f"{path.removesuffix(packed)}.t{packed}"
    files = [path, test] if Path(test).is_file() else [path]
    try:
        loaded = load_svmlight_files(files) if len(files) > 1 else load_svmlight_file(path)
    except Exception as error:  # whatever the parser stumbles over
        raise DataError(f"{path}: not in LIBSVM's format: {error}") from error
    matrices, targets = loaded[0::2], loaded[1::2]
    inputs = [_dense(file, matrix) for file, matrix in zip(files, matrices, strict=True)]
    names = np.unique(targets[0])
    if len(names) < 2 or not (np.isfinite(names).all() and np.array_equal(names, np.rint(names))):
        raise DataError(f"{path}: labels must be two or more different whole numbers, not {_some(names)}")
    labels = []
    for file, target in zip(files, targets, strict=True):
        unknown = np.setdiff1d(target, names)
        if len(unknown):
            raise DataError(f"{file}: label {unknown[0]:g} is not among those of {path}: {_some(names)}")
        labels.append(torch.from_numpy(np.searchsorted(names, target).astype(np.int64)))
    if len(files) == 1:
        return hold_out(inputs[0], labels[0], len(names))
    return Split(Examples(inputs[0], labels[0]), Examples(inputs[1], labels[1]), len(names))


LOADERS: dict[str, Callable[[str], Split]] = {
    "npz": load_npz,
    "libsvm": load_libsvm,
    "text": load_text,
    "folder": load_folder,
}
"""What ``dataset="PREFIX:/path"`` is read by."""


def _read_npz(path: str, names: Sequence[str]) -> dict[str, Array]:
    require_file(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in names if name not in file]
            if missing:
                raise DataError(
                    f"{path}: no array {missing[0]!r}; it needs {', '.join(names)}; it has "
                    f"{', '.join(file.files) or 'none'}"
                )
            return {name: np.asanyarray(file[name]) for name in names}
    except DataError:
        raise
    except Exception as error:  # zip, zlib and NumPy each fail in their own ways
        raise DataError(f"{path}: not a .npz file of plain arrays: {error}") from error


def _inputs(path: str, name: str, array: Array) -> Tensor:
    if array.dtype.kind not in "buif":
        raise DataError(f"{path}: {name} holds {array.dtype}, not numbers")
    if array.ndim > 2 and array.dtype.kind in "ui" and array.dtype != np.uint8:
        raise DataError(
            f"{path}: {name} holds images of {array.dtype}; allowed: uint8 (0 to 255) or floating point"
        )
    if array.ndim not in (2, 3, 4) or 0 in array.shape:
        raise DataError(
            f"{path}: {name} has shape {list(array.shape)}; allowed: [n, features], [n, height, width] or images "
            "with channels, none of them empty"
        )
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4:
        array = _channels_first(path, name, array)
    if array.dtype == np.uint8 and array.ndim == 4:
        return torch.from_numpy(np.ascontiguousarray(array))
    with np.errstate(over="ignore"):
        inputs = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    finite = torch.isfinite(inputs).flatten(1).all(dim=1)
    if not finite.all():
        raise DataError(f"{path}: {name} is not finite in float32, first in row {int(finite.int().argmin())}")
    return inputs


def _channels_first(path: str, name: str, array: Array) -> Array:
    if array.shape[-1] in _CHANNELS:
        return np.moveaxis(array, -1, 1)
    if array.shape[1] in _CHANNELS:
        return array
    raise DataError(f"{path}: {name} has shape {list(array.shape)}: no axis of 1, 3 or 4 channels, last or second")


def _labels(path: str, name: str, array: Array) -> Tensor:
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or array.dtype.kind not in "ui":
        raise DataError(
            f"{path}: {name} is {array.dtype} {list(array.shape)}; labels are whole numbers, one for each example"
        )
    if len(array) and int(array.min()) < 0:
        raise DataError(
            f"{path}: {name} holds the label {array.min()}, first in row {array.argmin()}; they start at 0"
        )
    if len(array) and int(array.max()) > np.iinfo(np.int64).max:
        raise DataError(f"{path}: {name} holds the label {array.max()}, first in row {array.argmax()}: too large")
    return torch.from_numpy(array.astype(np.int64))


def _same_length(path: str, part: str, inputs: Tensor, labels: Tensor) -> None:
    if len(inputs) != len(labels):
        raise DataError(f"{path}: x_{part} holds {len(inputs)} examples, but y_{part} {len(labels)} labels")


def _same_form(path: str, train: Tensor, test: Tensor) -> None:
    if train.shape[1:] != test.shape[1:] or train.dtype != test.dtype:
        raise DataError(
            f"{path}: x_train holds {train.dtype} {list(train.shape[1:])}, "
            f"but x_test {test.dtype} {list(test.shape[1:])}"
        )


def _count_classes(path: str, train: Tensor, test: Tensor) -> int:
    """Every label from 0 to the largest must occur: one that does not is more likely an error than a class."""
    classes = int(train.max()) + 1
    present = np.unique(train.numpy())
    if classes < 2 or len(present) != classes:
        raise DataError(
            f"{path}: y_train must hold all labels from 0 to the largest, two at least, not {_some(present)}"
        )
    if int(test.max()) >= classes:
        raise DataError(
            f"{path}: y_test holds the label {int(test.max())}, first in row {int(test.argmax())}; "
            f"those of y_train end at {classes - 1}"
        )
    return classes


def _dense(path: str, matrix: Any) -> Tensor:
    if not matrix.shape[0]:
        raise DataError(f"{path}: it holds no example")
    needed = matrix.shape[0] * matrix.shape[1] * 4
    if needed > _MAX_DENSE_BYTES:
        raise DataError(
            f"{path}: {matrix.shape[0]} examples of {matrix.shape[1]} features are too many to hold densely"
        )
    with np.errstate(over="ignore"):
        inputs = torch.from_numpy(matrix.astype(np.float32).toarray())
    if not torch.isfinite(inputs).all():
        raise DataError(f"{path}: a feature is not finite in float32")
    return inputs


def _some(values: Array) -> str:
    shown = ", ".join(f"{value:g}" for value in values[:5])
    return f"{shown}, … ({len(values)} different ones)" if len(values) > 5 else shown or "none"
