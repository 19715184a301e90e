"""The data of the examples, of what is installed already: ``python examples/make_data.py FOLDER``.

``FOLDER/digits`` holds scikit-learn's digits, training and test set, as Parquet files with the columns of
``uoft-cs/cifar10`` on the Hugging Face Hub: ``img``, an image of 32 × 32 pixels in three colours, and ``label``.
``FOLDER/python.txt`` is the beginning of Python's own reference, as ``help()`` shows it.
"""

import sys
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Picture
from pydoc_data.topics import topics
from sklearn.datasets import load_digits

TOPICS = 30


def main(folder: Path) -> None:
    digits = load_digits()
    images = [picture(values) for values in digits.images]
    is_test = np.arange(len(images)) % 5 == 4
    (folder / "digits").mkdir(parents=True, exist_ok=True)
    for split, chosen in (("train", ~is_test), ("test", is_test)):
        rows = np.flatnonzero(chosen)
        columns = {"img": [images[row] for row in rows], "label": digits.target[rows]}
        features = Features({"img": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
        Dataset.from_dict(columns, features).to_parquet(folder / "digits" / f"{split}.parquet")
    (folder / "python.txt").write_text("\n".join(topics[name] for name in sorted(topics)[:TOPICS]))


def picture(values: np.ndarray) -> Picture.Image:
    """Of 8 × 8 numbers from 0 to 16."""
    return Picture.fromarray((values * 15).astype(np.uint8)).resize((32, 32)).convert("RGB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
