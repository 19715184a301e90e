"""torchvision's data sets, downloaded by torchvision into its cache."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..extras import needs
from .examples import DataError, Examples, Split

_CLASSES = {
    "cifar10": ("CIFAR10", 10),
    "cifar100": ("CIFAR100", 100),
    "mnist": ("MNIST", 10),
    "fashion-mnist": ("FashionMNIST", 10),
}
NAMES = tuple(_CLASSES)


def load_vision(name: str) -> Split:
    """One of ``NAMES`` as uint8 images, from torch's cache folder ($TORCH_HOME/datasets).

    Raises:
        DataError: it is neither there nor can it be downloaded, or its files are damaged.
    """
    # Here, not on top: torchvision takes a second to import.
    with needs("tasks"):
        import torchvision
        from filelock import FileLock

    root = Path(torch.hub.get_dir()).parent / "datasets"
    class_name, classes = _CLASSES[name]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{name}.lock"):  # several processes may want it at once
            parts = [
                getattr(torchvision.datasets, class_name)(root, train, download=True) for train in (True, False)
            ]
    except Exception as error:  # no connection, no space, damaged files: each has its own
        raise DataError(f"dataset={name!r} in {root}: {error}") from error
    return Split(_examples(parts[0]), _examples(parts[1]), classes)


def _examples(part: Any) -> Examples:
    """MNIST and its like hold tensors [n, 28, 28], the CIFARs arrays [n, 32, 32, 3]."""
    images = torch.as_tensor(part.data)
    images = images[:, None] if images.dim() == 3 else images.movedim(-1, 1)
    return Examples(images.contiguous(), torch.as_tensor(np.asarray(part.targets), dtype=torch.int64))
