"""torchvision's own loaders, on tiny files in their formats; augmentation; nothing is downloaded."""

import hashlib
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision

from fedpm_flwr.config import Config
from fedpm_flwr.tasks import DataError, Examples, client_data, load_dataset
from fedpm_flwr.tasks.vision import load_vision


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "datasets"


def write_idx(path: Path, array: np.ndarray[Any, Any]) -> None:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + array.tobytes())


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_mnist_and_its_like(name: str, folder: str, cache: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8)
    labels = np.arange(12, dtype=np.uint8) % 10
    for part, count in (("train", 12), ("t10k", 5)):
        write_idx(cache / folder / "raw" / f"{part}-images-idx3-ubyte", images[:count])
        write_idx(cache / folder / "raw" / f"{part}-labels-idx1-ubyte", labels[:count])
    split = load_vision(name)
    assert (len(split.train), len(split.test), split.classes, split.input_shape) == (12, 5, 10, (1, 28, 28))
    image, label = split.train[11]
    np.testing.assert_allclose(image.numpy()[0], images[11] / 127.5 - 1, atol=1e-6)
    assert label == 1


def write_cifar(kind: Any, folder: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> np.ndarray[Any, Any]:
    """Files of a few images in CIFAR's format, and their checksums where torchvision looks for them."""
    rows = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8)
    folder.mkdir(parents=True)
    files = {}
    for name in ["train", "test", "meta"]:
        content: dict[str, Any] = {"data": rows, key: [0, 1, 2, 3, 4, 5]}
        if name == "meta":
            content = {"label_names": ["x"] * 10, "fine_label_names": ["x"] * 100}
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        files[name] = hashlib.md5(data).hexdigest()
    monkeypatch.setattr(kind, "train_list", [["train", files["train"]]])
    monkeypatch.setattr(kind, "test_list", [["test", files["test"]]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "filename": "meta", "md5": files["meta"]})
    return rows.reshape(6, 3, 32, 32)


@pytest.mark.parametrize(("name", "key", "classes"), [("cifar10", "labels", 10), ("cifar100", "fine_labels", 100)])
def test_cifar(name: str, key: str, classes: int, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    images = write_cifar(kind, cache / kind.base_folder, key, monkeypatch)
    split = load_vision(name)
    assert (len(split.train), split.classes, split.input_shape) == (6, classes, (3, 32, 32))
    np.testing.assert_allclose(split.test[[2, 3]][0].numpy(), images[[2, 3]] / 127.5 - 1, atol=1e-6)


def test_data_that_cannot_be_had_says_where_it_belongs(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/none.tar.gz")
    with pytest.raises(DataError, match=f"dataset='cifar10' in {cache}: .*"):
        load_vision("cifar10")


def test_a_cache_that_cannot_be_written_to_says_so(cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(DataError, match="dataset='mnist' in "):
        load_vision("mnist")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_augmented_images_are_moved_and_mirrored_each_time_anew(dtype: torch.dtype) -> None:
    image = torch.zeros(1, 3, 32, 32, dtype=dtype)
    image[0, 0, 16, 10] = 255
    plain = Examples(image.repeat(64, 1, 1, 1), torch.zeros(64, dtype=torch.int64))
    torch.manual_seed(0)
    first, again = (plain.augmented()[list(range(64))][0] for _ in range(2))
    assert first.shape == (64, 3, 32, 32)
    assert not torch.equal(first, again)
    bright = (first[:, 0] == first.max()).nonzero()
    assert len(bright) == 64
    assert set(bright[:, 1].tolist()) == set(range(12, 21))
    columns = set(bright[:, 2].tolist())
    assert columns <= set(range(6, 15)) | set(range(17, 26))
    assert columns & set(range(6, 15))
    assert columns & set(range(17, 26))
    assert plain.augmented()[3][0].shape == (3, 32, 32)
    assert torch.equal(plain[[5]][0], plain[[6]][0])


def test_only_images_are_augmented() -> None:
    with pytest.raises(DataError, match=r"augment=true is for images .* not inputs of shape \[30\]"):
        client_data(Config(dataset="breast-cancer"), 0, 3, augment=True)


def test_breast_cancer_is_standardised() -> None:
    split = load_dataset("breast-cancer")
    assert (len(split.train) + len(split.test), split.classes, split.input_shape) == (569, 2, (30,))
    torch.testing.assert_close(split.train.inputs.mean(dim=0), torch.zeros(30), atol=1e-5, rtol=0)
    torch.testing.assert_close(split.train.inputs.std(dim=0, correction=0), torch.ones(30), atol=1e-5, rtol=0)
