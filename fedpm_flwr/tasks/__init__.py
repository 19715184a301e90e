"""What the application trains: data sets, their partitions, models."""

from .datasets import Split, load_dataset
from .models import build_model
from .partitions import clients_data, partition_indices

__all__ = ["Split", "build_model", "clients_data", "load_dataset", "partition_indices"]
