"""Which examples belong to which client, by flwr-datasets' partitioners."""

from functools import lru_cache

import datasets
import numpy as np
import torch
from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, Partitioner
from torch.utils.data import Subset

from .datasets import load_dataset

_MIN_EXAMPLES = 10

Labels = np.ndarray[tuple[int], np.dtype[np.int64]]


def partition_indices(
    labels: Labels, num_partitions: int, *, partition: str = "dirichlet", alpha: float = 0.1, seed: int = 0
) -> list[list[int]]:
    """The examples of each client; together they are all examples, each once.

    A client that the Dirichlet distribution leaves with fewer than 10 (or half of an equal share, if
    that is less) gets the missing ones from whoever has most.

    Raises:
        ValueError: there are too few examples for so many clients.
    """
    least = min(_MIN_EXAMPLES, len(labels) // (2 * num_partitions))
    if least < 1:
        raise ValueError(f"{len(labels)} examples are too few for {num_partitions} clients")
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
    parts = [list(partitioner.load_partition(i)["index"]) for i in range(num_partitions)]
    for part in parts:
        while len(part) < least:
            part.append(max(parts, key=len).pop())
    return parts


@lru_cache(maxsize=8)
def clients_data(
    dataset: str, num_partitions: int, partition: str, alpha: float, seed: int
) -> list[Subset[tuple[torch.Tensor, ...]]]:
    """Each client's training examples, worked out once per process.

    Raises:
        ValueError: as ``partition_indices``.
    """
    split = load_dataset(dataset)
    parts = partition_indices(split.train_labels, num_partitions, partition=partition, alpha=alpha, seed=seed)
    return [Subset(split.train, part) for part in parts]
