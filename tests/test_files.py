"""Data from files: what is taken, and what is refused with a word that helps."""

import bz2
import pickle
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpm_flwr.tasks import DataError, load_dataset
from fedpm_flwr.tasks.files import load_libsvm, load_npz

Arrays = dict[str, Any]


def arrays(**changes: Any) -> Arrays:
    """Six training and three test images 4 × 5 of 3 channels, of two classes."""
    generator = np.random.default_rng(0)
    good = {
        "x_train": generator.integers(0, 256, (6, 4, 5, 3), dtype=np.uint8),
        "y_train": np.array([0, 1, 0, 1, 0, 1]),
        "x_test": generator.integers(0, 256, (3, 4, 5, 3), dtype=np.uint8),
        "y_test": np.array([1, 0, 1]),
    }
    return good | changes


def saved(folder: Path, content: Arrays) -> str:
    path = folder / "data.npz"
    np.savez(path, **content)
    return str(path)


@pytest.mark.parametrize("labels", [np.uint8, np.int64])
@pytest.mark.parametrize("first", [True, False], ids=["channels first", "channels last"])
def test_images_are_scaled_and_have_their_channels_first(labels: Any, first: bool, tmp_path: Path) -> None:
    content = arrays(y_train=np.array([[0], [1], [0], [1], [0], [1]], dtype=labels))
    split = load_npz(
        saved(tmp_path, content | ({"x_train": np.moveaxis(content["x_train"], -1, 1)} if first else {}))
    )
    assert (len(split.train), len(split.test), split.classes, split.input_shape) == (6, 3, 2, (3, 4, 5))
    images, targets = split.train[[4, 1]]
    assert images.dtype == torch.float32
    expected = np.moveaxis(content["x_train"][[4, 1]], -1, 1) / 127.5 - 1
    np.testing.assert_allclose(images.numpy(), expected, atol=1e-6)
    assert targets.tolist() == [0, 1]


def test_grey_images_get_a_channel_and_floats_stay_as_they_are(tmp_path: Path) -> None:
    pixels = np.linspace(0, 1, 6 * 4 * 5).reshape(6, 4, 5)
    split = load_npz(saved(tmp_path, arrays(x_train=pixels, x_test=pixels[:3])))
    assert split.input_shape == (1, 4, 5)
    np.testing.assert_allclose(split.train[2][0].numpy()[0], pixels[2], rtol=1e-6)


def test_features(tmp_path: Path) -> None:
    features = np.arange(12).reshape(6, 2)
    path = saved(tmp_path, arrays(x_train=features, x_test=features[:3]))
    split = load_dataset(f"npz:{path}", 4)
    assert split.input_shape == (2,)
    assert (len(split.train), len(split.test)) == (4, 3)
    assert split.train[1][0].tolist() == [2.0, 3.0]


NAN = arrays()["x_train"].astype(np.float32)
NAN[4, 0, 0, 0] = np.nan

REFUSED: dict[str, tuple[Arrays, str]] = {
    "label over": (arrays(y_test=np.array([0, 1, 7])), "y_test holds the label 7, first in row 2; those of"),
    "label under": (arrays(y_train=np.array([0, 1, -1, 0, 1, 1])), "y_train holds the label -1, first in row 2"),
    "label missing": (arrays(y_train=np.array([0, 3, 0, 3, 0, 3])), "y_train must hold all labels.* not 0, 3"),
    "one class": (arrays(y_train=np.zeros(6, dtype=int)), "two at least, not 0"),
    "255": (arrays(y_train=np.array([0, 1, 0, 1, 0, 255])), "y_train must hold all labels.* not 0, 1, 255"),
    "float labels": (arrays(y_train=np.zeros(6)), r"y_train is float64 \[6\]; labels are whole numbers"),
    "one-hot labels": (arrays(y_train=np.eye(6, 2, dtype=int)), r"y_train is int64 \[6, 2\]"),
    "text labels": (arrays(y_train=np.array(list("abcabc"))), r"y_train is <U1 \[6\]"),
    "fewer labels": (arrays(y_train=np.array([0, 1])), "x_train holds 6 examples, but y_train 2 labels"),
    "other test shape": (arrays(x_test=np.zeros((3, 4, 4, 3), np.uint8)), "x_train holds torch.uint8"),
    "no channels": (arrays(x_train=np.zeros((6, 5, 6, 7))), r"x_train has shape \[6, 5, 6, 7\]: no axis of 1"),
    "one axis": (arrays(x_train=np.zeros(6)), r"x_train has shape \[6\]; allowed"),
    "empty": (arrays(x_train=np.zeros((0, 4, 5, 3)), y_train=np.zeros(0, int)), r"x_train has shape \[0, 4"),
    "nan": (arrays(x_train=NAN), "x_train is not finite in float32, first in row 4"),
    "too large": (arrays(x_train=np.full((6, 4, 5, 3), 1e300)), "x_train is not finite.*first in row 0"),
    "wide pixels": (arrays(x_train=np.zeros((6, 4, 5, 3), int)), "x_train holds images of int64; allowed: uint8"),
    "other type": (arrays(x_test=np.zeros((3, 4, 5, 3), np.float32)), "x_train holds torch.uint8.*torch.float32"),
    "negative test label": (arrays(y_test=np.array([0, -1, 1])), "y_test holds the label -1, first in row 1"),
    "endless label": (arrays(y_test=np.array([0, 2**64 - 1, 1], np.uint64)), "label 1844.*too large"),
    "words": (arrays(x_train=np.full((6, 2), "x")), "x_train holds <U1, not numbers"),
    "objects": (arrays(x_train=np.array([{}] * 6)), "not a .npz file of plain arrays: Object arrays cannot be"),
    "missing": ({k: v for k, v in arrays().items() if k != "y_test"}, "no array 'y_test'.*it has x_train"),
}  # fmt: skip


def test_images_of_four_channels_and_a_limit_on_training_alone(tmp_path: Path) -> None:
    images = np.zeros((6, 5, 6, 4), np.uint8)
    path = saved(tmp_path, arrays(x_train=images, x_test=images[:3]))
    split = load_dataset(f"npz:{path}", 2)
    assert split.input_shape == (4, 5, 6)
    assert (len(split.train), len(split.test), split.classes) == (2, 3, 2)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(name: str, tmp_path: Path) -> None:
    content, message = REFUSED[name]
    path = saved(tmp_path, content)
    with pytest.raises(DataError, match=message) as caught:
        load_npz(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.npz: there is no such file on this machine"):
        load_npz(str(tmp_path / "nothing.npz"))
    with pytest.raises(DataError, match=": a folder"):
        load_libsvm(str(tmp_path))
    whole = Path(saved(tmp_path, arrays())).read_bytes()
    (tmp_path / "one.npy").write_bytes(b"")
    np.save(tmp_path / "one.npy", np.zeros(3))
    for number, data in enumerate([b"", b"PK", whole[:200], whole[:-40], pickle.dumps(3), b"\x93NUMPY"]):
        path = tmp_path / f"{number}.npz"
        path.write_bytes(data)
        with pytest.raises(DataError, match=f"{number}.npz: not a .npz file"):
            load_npz(str(path))
    with pytest.raises(DataError, match=r"one\.npy: not a \.npz file"):
        load_npz(str(tmp_path / "one.npy"))


@pytest.mark.parametrize("place", range(40, 400, 9))
def test_damage_anywhere_in_a_packed_file_is_an_error_of_ours_or_none(place: int, tmp_path: Path) -> None:
    path = tmp_path / "packed.npz"
    np.savez_compressed(path, **arrays())
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)
    with suppress(DataError):
        load_npz(str(path))


def test_a_member_that_is_no_array_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, arrays())
    other = tmp_path / "other.npz"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(other, "w") as target:
        for name in source.namelist():
            target.writestr(name, b"text" if name == "y_train.npy" else source.read(name))
    with pytest.raises(DataError, match=r"other\.npz: "):
        load_npz(str(other))


def test_damage_inside_is_found(tmp_path: Path) -> None:
    path = Path(saved(tmp_path, arrays()))
    data = bytearray(path.read_bytes())
    data[data.index(b"NUMPY") + 200] ^= 0xFF  # in the first array's numbers
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"not a \.npz file of plain arrays: Bad CRC-32"):
        load_npz(str(path))


LIBSVM = "\n".join(f"{-1 if i % 3 else 1} 1:{i} 3:0.5" for i in range(10))


def test_libsvm_holds_out_every_fifth_or_reads_the_test_file_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "tiny"
    path.write_text(LIBSVM)
    split = load_dataset(f"libsvm:{path}")
    assert (len(split.train), len(split.test), split.classes, split.input_shape) == (8, 2, 2, (3,))
    assert split.train.inputs[:3].tolist() == [[1, 0, 0.5], [2, 0, 0.5], [3, 0, 0.5]]
    assert split.train.labels[:3].tolist() == [0, 0, 1]
    (tmp_path / "tiny.t").write_text("1 5:2\n-1 2:1\n")
    split = load_libsvm(str(path))
    assert (len(split.train), len(split.test), split.input_shape) == (10, 2, (5,))
    assert split.test.inputs.tolist() == [[0, 0, 0, 0, 2], [0, 1, 0, 0, 0]]
    assert split.test.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 a:b\n", "not in LIBSVM's format"),
        ("1 2:1 1:1\n", "not in LIBSVM's format"),
        ("", "not in LIBSVM's format|holds no example"),
        ("1 1:1\n1 1:2\n", "two or more different whole numbers, not 1"),
        ("0.5 1:1\n1 1:2\n", "two or more different whole numbers, not 0.5, 1"),
        ("0 1:nan\n1 1:2\n", "a feature is not finite|not in LIBSVM's format"),
        ("0 1:1e300\n1 1:2\n", "a feature is not finite in float32"),
        ("inf 1:1\n1 1:2\n", "two or more different whole numbers, not 1, inf"),
        ("0 1:1\n1 2000000000:2\n", "too many to hold densely"),
    ],
)
def test_libsvm_files_that_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad"
    path.write_text(text)
    with pytest.raises(DataError, match=f"{path}: .*({message})"):
        load_libsvm(str(path))


def test_packed_libsvm_files_have_packed_test_files(tmp_path: Path) -> None:
    (tmp_path / "a.bz2").write_bytes(bz2.compress(LIBSVM.encode()))
    assert len(load_libsvm(str(tmp_path / "a.bz2")).test) == 2
    (tmp_path / "a.t.bz2").write_bytes(bz2.compress(b"1 1:1\n-1 2:1\n1 1:3\n"))
    split = load_libsvm(str(tmp_path / "a.bz2"))
    assert (len(split.train), len(split.test)) == (10, 3)


def test_a_test_label_that_training_lacks(tmp_path: Path) -> None:
    (tmp_path / "a").write_text(LIBSVM)
    (tmp_path / "a.t").write_text("2 1:1\n")
    with pytest.raises(DataError, match=r"a\.t: label 2 is not among those of .*a: -1, 1"):
        load_libsvm(str(tmp_path / "a"))
