"""Named tensors as safetensors wants them."""

from collections.abc import Mapping

import torch
from torch import Tensor


def own_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU: safetensors refuses tensors that share memory, as tied weights do."""
    return {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()
    }
