"""Which examples belong to which client, by flwr-datasets' partitioners."""

from functools import lru_cache

import numpy as np
from torch import Tensor
from torch.utils.data import Subset

from ..config import Config
from ..extras import needs
from .datasets import load_dataset
from .examples import Labels

_MIN_EXAMPLES = 10


def partition_indices(
    labels: Labels, num_partitions: int, *, partition: str = "dirichlet", alpha: float = 0.1, seed: int = 0
) -> list[list[int]]:
    """The examples of each client; together they are all examples, each once.

    ``contiguous``: nearly equal parts of the examples as they lie.

    A client that the Dirichlet distribution leaves with fewer than 10 (or half of an equal share, if
    that is less) gets the missing ones from whoever has most.

    Raises:
        ValueError: there are too few examples for so many clients.
    """
    least = min(_MIN_EXAMPLES, len(labels) // (2 * num_partitions))
    if least < 1:
        raise ValueError(f"{len(labels)} examples are too few for {num_partitions} clients")
    if partition == "contiguous":
        return [part.tolist() for part in np.array_split(np.arange(len(labels)), num_partitions)]
    with needs("tasks"):
        import datasets
        from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, Partitioner

    # The partitioners shuffle, so each example carries its own index along.
    order = np.random.default_rng(seed).permutation(len(labels))
    partitioner: Partitioner
    if partition == "iid":
        partitioner = IidPartitioner(num_partitions)
    else:
        partitioner = DirichletPartitioner(
            num_partitions, partition_by="label", alpha=alpha, min_partition_size=0, seed=seed
        )
    partitioner.dataset = datasets.Dataset.from_dict({"label": labels[order], "index": order})
    # A whole column at once: example by example takes minutes where there are a thousand clients.
    parts = [partitioner.load_partition(i)[:]["index"] for i in range(num_partitions)]
    for part in parts:
        while len(part) < least:
            part.append(max(parts, key=len).pop())
    return parts


def client_data(
    config: Config, partition: int, partitions: int, *, augment: bool = False
) -> Subset[tuple[Tensor, Tensor]]:
    """The training examples of one client of so many; the data are read and split once per process.

    Raises:
        DataError: as ``load_dataset``; or there are no images to augment.
        ValueError: as ``partition_indices``.
    """
    data = config.dataset, config.max_train_examples, config.validation_share
    train = load_dataset(*data).train
    parts = _parts(data, partitions, config.partition, config.alpha, config.seed)
    return Subset(train.augmented() if augment else train, parts[partition])


@lru_cache(maxsize=8)
def _parts(
    data: tuple[str, int, float], partitions: int, partition: str, alpha: float, seed: int
) -> list[list[int]]:
    labels = load_dataset(*data).train_labels
    return partition_indices(labels, partitions, partition=partition, alpha=alpha, seed=seed)
