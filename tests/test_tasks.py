"""Data sets, partitions and models of the application."""

import numpy as np
import pytest
import torch
from torch import nn

from fedpm_flwr.config import MODELS, Config
from fedpm_flwr.tasks import build_model, client_data, load_dataset, partition_indices


def test_digits() -> None:
    split = load_dataset("digits")
    assert len(split.train) + len(split.test) == 1797
    assert split.input_shape == (1, 8, 8)
    images, labels = split.train.inputs, split.train.labels
    assert images.dtype == torch.float32
    assert (float(images.min()), float(images.max())) == (0.0, 1.0)
    assert set(labels.tolist()) == set(split.test.labels.tolist()) == set(range(split.classes))
    assert load_dataset("digits") is split


@pytest.mark.parametrize("partition", ["dirichlet", "iid"])
@pytest.mark.parametrize("clients", [1, 3, 10, 100, 700])
def test_partitions_hold_every_example_once_and_none_is_empty(partition: str, clients: int) -> None:
    labels = load_dataset("digits").train_labels
    parts = partition_indices(labels, clients, partition=partition, alpha=0.1, seed=3)
    assert sorted(index for part in parts for index in part) == list(range(len(labels)))
    assert min(len(part) for part in parts) >= min(10, len(labels) // (2 * clients))
    assert parts == partition_indices(labels, clients, partition=partition, alpha=0.1, seed=3)


@pytest.mark.parametrize("alpha", [0.001, 0.01, 1000.0])
def test_extreme_alphas(alpha: float) -> None:
    labels = load_dataset("digits").train_labels
    assert all(partition_indices(labels, 10, alpha=alpha, seed=seed) for seed in range(3))


def skew(partition: str, alpha: float) -> float:
    """The mean over clients of the largest label's share of the client's examples."""
    labels = load_dataset("digits").train_labels
    parts = [labels[part] for part in partition_indices(labels, 10, partition=partition, alpha=alpha)]
    return float(np.mean([np.bincount(part).max() / len(part) for part in parts]))


def test_a_small_alpha_skews_labels() -> None:
    assert skew("dirichlet", 0.1) > 0.4 > 0.25 > skew("dirichlet", 100.0)
    assert skew("iid", 0.1) < 0.25


def test_the_seed_changes_the_partition() -> None:
    labels = load_dataset("digits").train_labels
    assert partition_indices(labels, 5, seed=0) != partition_indices(labels, 5, seed=1)


def test_too_few_examples_are_an_error() -> None:
    with pytest.raises(ValueError, match="6 examples are too few for 4 clients"):
        partition_indices(np.zeros(6, dtype=np.int64), 4)


def test_clients_get_their_own_examples() -> None:
    split = load_dataset("digits")
    data = [client_data(Config(alpha=0.5, seed=1), partition, 4) for partition in range(4)]
    parts = partition_indices(split.train_labels, 4, alpha=0.5, seed=1)
    assert [len(one) for one in data] == [len(part) for part in parts]
    assert torch.equal(data[2][0][0], split.train[parts[2][0]][0])


@pytest.mark.parametrize("name", MODELS)
def test_models_are_functions_of_their_seed_and_leave_the_generator_alone(name: str) -> None:
    state = torch.get_rng_state()
    first, again, other = (build_model(name, (1, 16, 16), 10, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first(torch.zeros(2, 1, 16, 16)).shape == (2, 10)
    for p, q in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


def test_a_model_that_cannot_take_the_inputs_says_so() -> None:
    with pytest.raises(ValueError, match="model='cnn' takes images"):
        build_model("cnn", (30,), 2, 0)


def test_resnet18_has_group_norms_and_the_stem_for_small_images() -> None:
    model = build_model("resnet18-gn", (3, 32, 32), 7, 0)
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    assert len(norms) == 20
    assert {norm.num_groups for norm in norms} == {32}
    assert not any(isinstance(module, nn.BatchNorm2d | nn.MaxPool2d) for module in model.modules())
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    assert (first.kernel_size, first.stride, first.padding) == ((3, 3), (1, 1), (1, 1))
