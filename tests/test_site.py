"""The data of a site, read and checked; images in folders; what an operator is told."""

import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message
from PIL import Image

import client_app
import server_app
from fedpm_flwr.config import Config
from fedpm_flwr.inline import Client, run_inline
from fedpm_flwr.tasks import DataError, Form, client_data, load_dataset, site_data
from fedpm_flwr.tasks.folders import read_folder

from .helpers import without_rights

FORM = Form((1, 4, 4), torch.float32, 3)


Array = np.ndarray[Any, np.dtype[Any]]


def npz(path: Path, **arrays: Array | None) -> Path:
    usual: dict[str, Array | None] = {"x_train": np.zeros((5, 4, 4), np.float32)}
    given = {**usual, "y_train": np.array([0, 1, 0, 2, 1]), **arrays}
    present: dict[str, Any] = {name: array for name, array in given.items() if array is not None}
    np.savez(path, **present)
    return path


def images(folder: Path, classes: Sequence[str], side: int = 4, mode: str = "L", count: int = 2) -> Path:
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for image in range(count):
            Image.new(mode, (side, side), number * 10 if mode == "L" else (number * 10,) * 3).save(
                folder / name / f"{image}.png"
            )
    return folder


def test_a_npz_of_a_site_needs_neither_test_data_nor_every_label(tmp_path: Path) -> None:
    path = npz(tmp_path / "a.npz", y_train=np.array([2, 2, 0, 2, 2]))
    examples = site_data(str(path), FORM)
    assert (len(examples), examples.input_shape, examples.labels.tolist()) == (5, (1, 4, 4), [2, 2, 0, 2, 2])


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("P", 3), ("RGBA", 3)])
def test_a_folder_of_images(mode: str, channels: int, tmp_path: Path) -> None:
    """As torchvision's ImageFolder: labels are the places of the folders in the order of their names."""
    folder = images(tmp_path / "site", ["b", "a", "c"], mode="L" if mode == "L" else "RGB")
    for path in folder.rglob("*.png"):
        with Image.open(path) as image:
            changed = image.convert(mode, palette=Image.Palette.ADAPTIVE)
        changed.save(path)
    for path in (folder / "c").iterdir():
        path.unlink()  # a class that this site has no images of
    examples = site_data(str(folder), Form((channels, 4, 4), torch.float32, 3))
    assert examples.labels.tolist() == [0, 0, 1, 1]
    pixels, _ = examples[[0, 2]]
    assert pixels.shape == (2, channels, 4, 4)
    # "a" was drawn as 10 of 255, "b" as 0.
    torch.testing.assert_close(pixels[:, 0, 0, 0], torch.tensor([10 / 127.5 - 1, -1.0]))


def test_a_dataset_of_folders_is_shared_by_simulation_and_deployment(tmp_path: Path) -> None:
    images(tmp_path / "data" / "train", ["cat", "dog"], side=8, count=6)
    images(tmp_path / "data" / "test", ["cat", "dog"], side=8)
    split = load_dataset(f"folder:{tmp_path / 'data'}")
    assert (len(split.train), len(split.test), split.form) == (12, 4, Form((1, 8, 8), torch.float32, 2))
    site = site_data(str(tmp_path / "data" / "train"), split.form)
    assert torch.equal(site.inputs, split.train.inputs)
    assert torch.equal(site.labels, split.train.labels)


def broken(folder: Path) -> Path:
    images(folder, ["a", "b", "c"])
    (folder / "b" / "1.png").write_bytes(b"no image")
    return folder


def of_two_sizes(folder: Path) -> Path:
    images(folder, ["a", "b", "c"])
    Image.new("L", (5, 4)).save(folder / "c" / "2.png")
    return folder


def of_wide_pixels(folder: Path, mode: str) -> Path:
    images(folder, ["a", "b", "c"])
    Image.new(mode, (4, 4), 300).save(folder / "c" / ("2.tif" if mode == "F" else "2.png"))
    return folder


def of_enormous_size(folder: Path) -> Path:
    """A few bytes that say they are 20 000 × 20 000 pixels."""
    images(folder, ["a", "b", "c"])
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b""))
    png = b"\x89PNG\r\n\x1a\n"
    for kind, data in chunks:
        png += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    (folder / "b" / "9.png").write_bytes(png)
    return folder


def unreadable(path: Path) -> Path:
    path.write_text("one,two")
    return path


BAD: dict[str, tuple[Callable[[Path], Path | str], str]] = {
    "relative": (lambda folder: "data/a.npz", "data-path='data/a.npz' is not an absolute path"),
    "nothing": (lambda folder: folder / "none", "data-path='.*none': there is nothing here"),
    "16 bits": (
        lambda folder: of_wide_pixels(folder, "I;16"),
        "2.png: an image of mode I;16; allowed: 8 bits a channel: 1, L",
    ),
    "floats": (
        lambda folder: of_wide_pixels(folder, "F"),
        "2.tif: an image of mode F; allowed: 8 bits",
    ),
    "a bomb": (of_enormous_size, r"9.png: not an image: Image size \(400000000 pixels\) exceeds limit"),
    "another kind": (lambda folder: unreadable(folder / "a.csv"), "neither a folder of images nor a .npz file"),
    "no npz": (lambda folder: unreadable(folder / "a.npz"), "a.npz: not a .npz file of plain arrays"),
    "no labels": (
        lambda folder: npz(folder / "a.npz", y_train=None),
        "a.npz: no array 'y_train'; it needs x_train, y_train; it has x_train",
    ),
    "lengths": (
        lambda folder: npz(folder / "a.npz", y_train=np.array([0, 1])),
        "a.npz: x_train holds 5 examples, but y_train 2 labels",
    ),
    "shape": (
        lambda folder: npz(folder / "a.npz", x_train=np.zeros((5, 5, 4), np.float32)),
        r"a.npz: its inputs are \[1, 5, 4\], where the model takes \[1, 4, 4\]",
    ),
    "label": (
        lambda folder: npz(folder / "a.npz", y_train=np.array([0, 1, 3, 1, 1])),
        "a.npz: the label 3, first in row 2; those of the model end at 2",
    ),
    "no classes": (lambda folder: folder, "no folder of a class in it, each with images"),
    "no images": (
        lambda folder: images(folder / "a", ["x"], count=0).parent,
        "no images in the folders of its cl",
    ),
    "a class too few": (
        lambda folder: images(folder / "site", ["a", "b"]),
        "site: 2 folders of classes, where the model has 3 classes: .* here are a, b",
    ),
    "a broken image": (lambda folder: broken(folder / "site"), r"b/1.png: not an image"),
    "two sizes": (
        lambda folder: of_two_sizes(folder / "site"),
        r"c/2.png: an image \[1, 4, 5\] .*, where the first one, .*a/0.png, is \[1, 4, 4\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_named(case: str, tmp_path: Path) -> None:
    make, told = BAD[case]
    with pytest.raises(DataError, match=told):
        site_data(str(make(tmp_path)), FORM)


@pytest.mark.parametrize("deep", ["", "more"])
def test_images_that_this_user_may_not_read_are_not_left_out(
    deep: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)  # a relative path: the folders above are pytest's, for its own user alone
    images(Path("site"), ["cat", "dog"])
    images(Path("site", "dog"), ["more"])
    assert read_folder("site")[0].labels.tolist() == [0, 0, 1, 1, 1, 1]
    closed = Path("site", "dog", deep)
    closed.chmod(0)
    with without_rights(), pytest.raises(DataError, match=f"^{closed}: cannot be read: Permission denied"):
        read_folder("site")
    closed.chmod(0o755)


@pytest.mark.parametrize("place", ["owl", "dog/more"])
def test_links_to_images_elsewhere_are_followed_or_refused(place: str, tmp_path: Path) -> None:
    site = images(tmp_path / "site", ["cat", "dog"])
    elsewhere = images(tmp_path / "elsewhere", ["more"])
    (site / place).symlink_to(elsewhere / "more")
    assert len(read_folder(str(site))[0]) == 6
    elsewhere.rename(tmp_path / "gone")
    with pytest.raises(DataError, match=f"^{site / place}: cannot be read: a link to {elsewhere}/more"):
        read_folder(str(site))


def test_text_has_no_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"its inputs are torch.float32, where the model takes torch.int64"):
        site_data(str(npz(tmp_path / "a.npz")), Form((1, 4, 4), torch.int64, 3))


def test_train_and_test_must_fit(tmp_path: Path) -> None:
    images(tmp_path / "a" / "train", ["x", "y"])
    with pytest.raises(DataError, match=r"a/test: there is no such folder on this machine"):
        load_dataset(f"folder:{tmp_path / 'a'}")
    images(tmp_path / "a" / "test", ["x", "z"])
    with pytest.raises(DataError, match=r"a: train and test have different classes; only in one: y, z"):
        load_dataset(f"folder:{tmp_path / 'a'}")
    images(tmp_path / "b" / "train", ["x", "y"])
    images(tmp_path / "b" / "test", ["x", "y"], side=6)
    with pytest.raises(DataError, match=r"b: train has images \[1, 4, 4\], test \[1, 6, 6\]"):
        load_dataset(f"folder:{tmp_path / 'b'}")


def test_the_form_travels_as_text() -> None:
    assert Form.from_text(FORM.to_text()) == FORM
    for text in ("", "{}", "[]", '{"input-shape": 3, "input-dtype": "float32", "classes": 2}', "null"):
        with pytest.raises(ValueError, match="not the form of a data set"):
            Form.from_text(text)


def site(path: Path | str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "fedpm_flwr.tasks", str(path)], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_an_operator_can_ask_before_starting_a_node(tmp_path: Path) -> None:
    assert site(npz(tmp_path / "a.npz")) == (
        0,
        f"{tmp_path}/a.npz: 5 examples, inputs [1, 4, 4] (torch.float32), by label 0: 2, 1: 2, 2: 1\n",
    )
    code, told = site(tmp_path / "none.npz")
    assert (code, told) == (1, f"data-path='{tmp_path}/none.npz': there is nothing here\n")


def with_data(paths: dict[int, str]) -> Client:
    """The application's client on nodes of which some have their site's data."""

    def client(message: Message, context: Context) -> Message:
        number = context.node_config["partition-id"]
        assert isinstance(number, int)
        if number in paths:
            context.node_config["data-path"] = paths[number]
        return client_app.app(message, context)

    return client


def run(folder: Path, paths: dict[int, str]) -> list[str]:
    config = Config(model="mlp", num_server_rounds=2, alpha=1.0, output=str(folder))
    run_inline(server_app.app, with_data(paths), 3, config.to_run_config())
    lines = (folder / "metrics.csv").read_text().splitlines()
    head = lines[0].split(",")
    return [line.split(",")[head.index("test-loss")] for line in lines[1:]]


def test_sites_with_the_data_of_the_partitions_train_the_same_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = run(tmp_path / "plain", {})
    paths = {}
    for number in range(3):
        data = client_data(Config(alpha=1.0), number, 3)
        inputs, labels = data.dataset[data.indices]
        paths[number] = str(tmp_path / f"{number}.npz")
        np.savez(paths[number], x_train=inputs.numpy(), y_train=labels.numpy())
    assert run(tmp_path / "sites", paths) == plain
    caplog.clear()
    assert run(tmp_path / "one wrong", {**paths, 1: str(tmp_path / "gone.npz")}) != plain
    assert "does not say its partition: DataError: data-path=" in caplog.text
    assert caplog.text.count("left out the reply of node") == 2
