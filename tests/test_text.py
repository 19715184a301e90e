"""Text from a file: its characters as classes, its windows, what is refused, and what a model makes of it."""

from pathlib import Path

import pytest
import torch

from fedpm_flwr.config import Config
from fedpm_flwr.tasks import DataError, build_model, client_data, load_dataset, partition_indices
from fedpm_flwr.tasks.text import load_text

ALPHABET = "Zaé🙂\n"
TEXT = "".join(ALPHABET[place * place % 7 % 5] for place in range(100)) + ALPHABET


def written(folder: Path, text: str | bytes) -> str:
    path = folder / "text.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def test_every_window_is_labelled_with_the_character_after_it(tmp_path: Path) -> None:
    split = load_dataset(f"text:{written(tmp_path, TEXT)}")
    order = sorted(ALPHABET)
    assert order == ["\n", "Z", "a", "é", "🙂"]
    assert (split.classes, split.input_shape, split.input_dtype) == (5, (16,), torch.int64)
    assert (len(split.train), len(split.test)) == (84 - 16, 21 - 16)
    for part, start in ((split.train, 0), (split.test, 84)):
        for index in range(len(part)):
            inputs, label = part[index]
            assert (inputs.dtype, label.dtype) == (torch.int64, torch.int64)
            seen = "".join(order[number] for number in [*inputs.tolist(), int(label)])
            assert seen == TEXT[start + index : start + index + 17]
    batch, labels = split.test[[4, 0]]
    assert torch.equal(batch, torch.stack([split.test[4][0], split.test[0][0]]))
    assert labels.tolist() == [order.index(TEXT[104]), order.index(TEXT[100])]


def test_line_ends_stay_as_they_are_and_a_limit_is_on_training_alone(tmp_path: Path) -> None:
    split = load_dataset(f"text:{written(tmp_path, 'ab' + chr(13) + chr(10) + 'c' * 100)}", 7)
    assert split.classes == 5
    assert (len(split.train), len(split.test)) == (7, 20 - 16)
    assert split.train[0][0].tolist() == [2, 3, 1, 0] + [4] * 12


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"ab" * 60 + b"\xff", "not UTF-8: invalid start byte at byte 120, counted from 0"),
        ("é".encode() * 60 + b"\xc3", "not UTF-8: unexpected end of data at byte 120"),
        ("caffè".encode("latin-1") * 60, "not UTF-8: invalid continuation byte at byte 4"),
        ("", "it holds 0 characters; a text needs 100 at least"),
        ("éa" * 49 + "b", "it holds 99 characters; a text needs 100"),
        ("\n" * 100, r"all its characters are '\\n'; a text needs two different ones"),
    ],
)
def test_texts_that_are_refused(text: str | bytes, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(DataError, match=f"^{path}: {message}"):
        load_text(path)


def test_paths_that_are_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"nothing\.txt: there is no such file on this machine"):
        load_text(str(tmp_path / "nothing.txt"))
    with pytest.raises(DataError, match=f"{tmp_path}: a folder"):
        load_text(str(tmp_path))

    def forbidden(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    path = written(tmp_path, TEXT)
    monkeypatch.setattr(Path, "read_bytes", forbidden)
    with pytest.raises(DataError, match=f"^{path}: cannot be read: Permission denied$"):
        load_text(path)


@pytest.mark.parametrize("partition", ["dirichlet", "iid"])
def test_rare_characters_are_shared_out_like_the_others(partition: str, tmp_path: Path) -> None:
    text = "ab" * 200 + "once" + "ba" * 200 + "only in the test part: Q"
    dataset = f"text:{written(tmp_path, text)}"
    labels = load_dataset(dataset).train_labels
    assert 0 < (labels == sorted(set(text)).index("o")).sum() <= 2
    for seed in range(5):
        parts = partition_indices(labels, 10, partition=partition, alpha=0.1, seed=seed)
        assert sorted(index for part in parts for index in part) == list(range(len(labels)))
        assert min(map(len, parts)) >= 10
    inputs, targets = client_data(Config(dataset=dataset, partition=partition), 3, 10)[0]
    assert (inputs.shape, inputs.dtype, targets.dtype) == ((16,), torch.int64, torch.int64)


def test_text_is_not_augmented(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"augment=true is for images .* not inputs of shape \[16\]"):
        client_data(Config(dataset=f"text:{written(tmp_path, TEXT)}"), 0, 2, augment=True)


def test_char_lm_reads_every_character_and_its_place() -> None:
    model = build_model("char-lm", (16,), 7, 0, torch.int64)
    text = torch.arange(16)[None] % 7
    outputs = model(text)
    assert outputs.shape == (1, 7)
    for place in range(16):
        other = text.clone()
        other[0, place] = (other[0, place] + 1) % 7
        assert not torch.allclose(model(other), outputs, atol=1e-6)
    assert not torch.allclose(model(text.flip(1)), outputs, atol=1e-6)
