"""Files of tensors that appear whole or not at all, and tell if a bit of them has changed."""

import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .wire import own_copies

SUFFIX = ".safetensors"
_PART = re.compile(rf".+\{SUFFIX}\.[0-9a-f]{{32}}\.part")
"""The folder that a file is written in, beside the place where it is to be."""
_DIGEST = "sha256"


class DamagedFileError(ValueError):
    """A file is cut short, has changed, or is of another kind or version."""


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, private: bool = True
) -> None:
    """A safetensors file with these tensors and this text, beside the SHA-256 of both.

    It is written in a folder of its own, flushed to the disk and moved: who looks for ``path`` finds the old
    file or the new one. What a writer that was killed has left beside it is removed: nobody else may be writing
    such files into the same folder. ``private``: readable by its user alone; else as other files are.

    Raises:
        OSError: the disk is full, or the folder cannot be written to; the old file is as it was.
    """
    own = own_copies(tensors)
    _remove_parts(path.parent)
    # A folder: safetensors first writes a file under a name of its own choosing, beside the one that is wanted.
    folder = Path(f"{path}.{uuid.uuid4().hex}.part")
    folder.mkdir(mode=0o700)
    part = folder / path.name
    try:
        part.touch(0o600 if private else 0o666)
        mode = part.stat().st_mode & 0o777  # less what the umask takes; safetensors makes a file of its own
        save_file(own, part, {**metadata, _DIGEST: _digest(own, metadata)})
        part.chmod(mode)
        flush(part)
        os.replace(part, path)
        flush(path.parent)
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(f"{path}: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the text that ``write_tensors`` has written.

    Raises:
        OSError: the file cannot be read.
        DamagedFileError: it is not as it was written.
    """
    with _opened(path) as file:
        metadata: dict[str, str] = file.metadata() or {}
        names: list[str] = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
    digest = metadata.pop(_DIGEST, None)
    if digest != _digest(tensors, metadata):
        raise DamagedFileError(f"{path}: its contents are not those that were written (SHA-256)")
    return tensors, metadata


def read_metadata(path: Path) -> dict[str, str]:
    """The text alone, without a look at whether it has changed; otherwise as ``read_tensors``."""
    with _opened(path) as file:
        metadata: dict[str, str] = file.metadata() or {}
    return metadata


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise DamagedFileError(f"{path}: not a safetensors file, or cut short: {error}") from error


def _remove_parts(folder: Path) -> None:
    for part in folder.iterdir():
        if _PART.fullmatch(part.name):
            shutil.rmtree(part, ignore_errors=True)


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Of names, dtypes, shapes and numbers; the order of neither mapping counts."""
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        if tensor.numel():
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def copy_if_there(source: Path | str, to: Path | str) -> None:
    """A copy, flushed to the disk; none if the file is gone, as where a run that goes on needs it no longer."""
    with suppress(FileNotFoundError):
        flush(Path(shutil.copy2(source, to)))


def flush(path: Path) -> None:
    """To the disk itself, file or folder, where the system can."""
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
