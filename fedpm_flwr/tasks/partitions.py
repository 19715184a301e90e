"""Which examples belong to which client, by flwr-datasets' partitioners."""

from functools import lru_cache

import datasets
import numpy as np
import torch
from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, Partitioner
from torch.utils.data import Subset

from .datasets import load_dataset

_MIN_EXAMPLES = 10


def partition_indices(
    labels: np.ndarray[tuple[int], np.dtype[np.int64]],
    partition_id: int,
    num_partitions: int,
    *,
    partition: str = "dirichlet",
    alpha: float = 0.1,
    seed: int = 0,
) -> list[int]:
    """The examples of one client; all clients' together are all examples, each once.

    Raises:
        ValueError: there is no such partition, or there are too few examples for so many clients.
    """
    if not 0 <= partition_id < num_partitions:
        raise ValueError(f"partition-id={partition_id} is not one of {num_partitions} partitions")
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
            num_partitions, partition_by="label", alpha=alpha, min_partition_size=least, seed=seed
        )
    partitioner.dataset = datasets.Dataset.from_dict({"label": labels[order], "index": order})
    return list(partitioner.load_partition(partition_id)["index"])


@lru_cache(maxsize=1024)
def client_data(
    dataset: str, partition_id: int, num_partitions: int, partition: str, alpha: float, seed: int
) -> Subset[tuple[torch.Tensor, ...]]:
    """A client's training examples, worked out once per process.

    Raises:
        ValueError: as ``partition_indices``.
    """
    split = load_dataset(dataset)
    indices = partition_indices(
        split.train_labels, partition_id, num_partitions, partition=partition, alpha=alpha, seed=seed
    )
    return Subset(split.train, indices)
