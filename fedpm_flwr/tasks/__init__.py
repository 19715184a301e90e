"""What the application trains: data sets, their partitions, models."""

from .datasets import load_dataset
from .examples import DataError, Examples, Split
from .models import build_model, distance, load_reference, load_weights
from .partitions import client_data, partition_indices

__all__ = [
    "DataError",
    "Examples",
    "Split",
    "build_model",
    "client_data",
    "distance",
    "load_dataset",
    "load_reference",
    "load_weights",
    "partition_indices",
]
