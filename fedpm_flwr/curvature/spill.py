"""Tensors that are kept for long go to disk beyond a limit of memory."""

import os
import tempfile

import torch
from torch import Tensor


class Spill:
    """Keeps tensors: in memory until ``limit`` bytes of them are there, the others in files.

    A tensor on disk is mapped into memory: it can be computed with as any other on the CPU, and the
    operating system reads what is used and lets go of it again. Its file has no name any more, so
    nothing is left behind, whatever happens.

    Args:
        limit: bytes to keep in memory.
        folder: where the files are; by default the system's temporary folder (``TMPDIR``), which
            should not itself be in memory.
    """

    def __init__(self, limit: int = 4 << 30, folder: str | None = None) -> None:
        self._left = limit
        self._folder = folder
        self.spilled = 0
        """Bytes on disk so far."""

    def keep(self, tensor: Tensor) -> Tensor:
        """The same numbers, in memory or on disk."""
        size = tensor.numel() * tensor.element_size()
        if size <= self._left or not size:
            self._left -= size
            return tensor
        handle, path = tempfile.mkstemp(prefix="fedpm-", dir=self._folder)
        try:
            with os.fdopen(handle, "wb") as file:
                tensor.detach().cpu().contiguous().numpy().tofile(file)
            mapped = torch.from_file(path, shared=False, size=tensor.numel(), dtype=tensor.dtype)
        finally:
            os.unlink(path)
        self.spilled += size
        return mapped.reshape(tensor.shape)
