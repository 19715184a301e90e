"""Folders of images, one subfolder a class, as torchvision's ImageFolder reads them."""

import os
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

from ..extras import needs
from .examples import DataError, Examples, Split

_PARTS = ("train", "test")
_GREY = ("1", "L", "LA")
_COLOUR = ("RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB")


def load_folder(path: str) -> Split:
    """PATH/train/CLASS/… and PATH/test/CLASS/…, all of one size and with the same classes.

    Raises:
        DataError: naming the folder or file and what is wrong with it.
    """
    (train, classes), (test, other) = (read_folder(str(Path(path) / part)) for part in _PARTS)
    if classes != other:
        odd = sorted({*classes} ^ {*other})
        raise DataError(f"{path}: train and test have different classes; only in one: {', '.join(odd[:5])}")
    if train.input_shape != test.input_shape:
        raise DataError(f"{path}: train has images {list(train.input_shape)}, test {list(test.input_shape)}")
    return Split(train, test, len(classes))


def read_folder(path: str) -> tuple[Examples, tuple[str, ...]]:
    """PATH/CLASS/….png and so on: uint8 images [channels, height, width], and the classes in their order.

    Grey images have one channel, all others three. A class may have no images; it has its folder all the same,
    since the labels are the folders' places in the order of their names.

    Raises:
        DataError: naming the folder or file and what is wrong with it.
    """
    # Here, not on top: torchvision takes a second to import.
    with needs("tasks"):
        from PIL import Image
        from torchvision.datasets import ImageFolder
        from torchvision.datasets.folder import IMG_EXTENSIONS

    if not Path(path).is_dir():
        raise DataError(f"{path}: there is no such folder on this machine")
    _check_readable(path)
    try:
        folder = ImageFolder(path, allow_empty=True)
    except (FileNotFoundError, OSError) as error:  # what it makes of a folder without classes
        raise DataError(f"{path}: no folder of a class in it, each with images: {error}") from error
    if not folder.samples:
        raise DataError(f"{path}: no images in the folders of its classes ({', '.join(IMG_EXTENSIONS)})")
    images: list[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]] = []
    for file, _ in folder.samples:
        try:
            with Image.open(file) as opened:
                mode = opened.mode
                # Wider pixels would be cut off at 255, their scale is not known.
                if mode not in _GREY + _COLOUR:
                    raise DataError(
                        f"{file}: an image of mode {mode}; allowed: 8 bits a channel: {', '.join(_GREY + _COLOUR)}"
                    )
                image = np.asarray(opened.convert("L" if mode in _GREY else "RGB"))
        except DataError:
            raise
        # Whatever is wrong with a file.
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{file}: not an image: {error}") from error
        image = np.atleast_3d(image).transpose(2, 0, 1)
        if images and image.shape != images[0].shape:
            raise DataError(
                f"{file}: an image {list(image.shape)} (channels, height, width), where the first one, "
                f"{folder.samples[0][0]}, is {list(images[0].shape)}"
            )
        images.append(image)
    labels = torch.tensor(folder.targets, dtype=torch.int64)
    return Examples(torch.from_numpy(np.stack(images)), labels), tuple(folder.classes)


def _check_readable(path: str) -> None:
    """ImageFolder passes over folders that cannot be read, as if they were empty.

    Raises:
        DataError: naming such a folder, or a link to what is not there, as outside of what a container sees.
    """

    def refuse(error: OSError) -> NoReturn:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error

    for folder, _, names in os.walk(path, onerror=refuse, followlinks=True):
        for name in names:
            if (file := Path(folder, name)).is_symlink() and not os.access(file, os.R_OK):
                raise DataError(f"{file}: cannot be read: a link to {os.readlink(file)}")
