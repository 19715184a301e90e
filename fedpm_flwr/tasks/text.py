"""Text from the user's own file: characters, each to be predicted from those before it."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .examples import DataError, Examples, Split, require_file

_WINDOW = 16
_TEST_SHARE = 5
_LEAST = 100
"""So few characters still leave a test set: a fifth of them is longer than a window."""


def load_text(path: str) -> Split:
    """A text in UTF-8: windows of 16 characters, each labelled with the character that follows it.

    The classes are the different characters of the whole text, from 0 in the order of their code points;
    inputs are int64 [windows, 16], a window from every place. The last fifth of the text is the test set,
    and no window reaches across its border. Not every class need be a label of the training examples.

    Raises:
        DataError: naming the file and what is wrong with it.
    """
    text = _read(path)
    if len(text) < _LEAST:
        raise DataError(f"{path}: it holds {len(text)} characters; a text needs {_LEAST} at least")
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    characters, numbers = np.unique(points, return_inverse=True)
    if len(characters) < 2:
        raise DataError(f"{path}: all its characters are {text[0]!r}; a text needs two different ones at least")
    codes = torch.from_numpy(numbers.astype(np.int64))
    end = len(codes) - len(codes) // _TEST_SHARE
    return Split(_windows(codes[:end]), _windows(codes[end:]), len(characters))


def _read(path: str) -> str:
    require_file(path)
    try:
        return Path(path).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8: {error.reason} at byte {error.start}, counted from 0") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _windows(codes: Tensor) -> Examples:
    """Every window and its next character; windows overlap, and share the text's memory."""
    return Examples(codes[:-1].unfold(0, _WINDOW, 1), codes[_WINDOW:])
