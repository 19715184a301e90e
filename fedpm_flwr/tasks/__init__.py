"""What the application trains: data sets, their partitions, sites' own data, models."""

from .datasets import load_dataset
from .examples import DataError, Examples, Form, Split
from .models import build_model, distance, load_reference, load_weights
from .partitions import client_data, partition_indices
from .site import site_data

__all__ = [
    "DataError",
    "Examples",
    "Form",
    "Split",
    "build_model",
    "client_data",
    "distance",
    "load_dataset",
    "load_reference",
    "load_weights",
    "partition_indices",
    "site_data",
]
