"""Data sets, partitions and models of the application."""

import numpy as np
import pytest
import torch
from torch import nn

from fedpm_flwr.config import MODELS, Config
from fedpm_flwr.tasks import Examples, build_model, client_data, load_dataset, partition_indices
from fedpm_flwr.tasks.vit import VisionTransformer, _Block


def test_digits() -> None:
    split = load_dataset("digits")
    assert len(split.train) + len(split.test) == 1797
    assert split.input_shape == (1, 8, 8)
    images, labels = split.train.inputs, split.train.labels
    assert images.dtype == torch.float32
    assert (float(images.min()), float(images.max())) == (0.0, 1.0)
    assert set(labels.tolist()) == set(split.test.labels.tolist()) == set(range(split.classes))
    assert load_dataset("digits") is split


def test_a_share_of_the_training_examples_takes_the_place_of_the_test_set() -> None:
    whole, split = load_dataset("digits", 1000), load_dataset("digits", 1000, 0.2)
    assert (len(split.train), len(split.test)) == (800, 200)
    together = sorted(image.flatten().tolist() for part in (split.train, split.test) for image in part.inputs)
    assert together == sorted(image.flatten().tolist() for image in whole.train.inputs), "each of them once"
    assert set(split.test.labels.tolist()) == set(range(10))
    for examples in (split.train, split.test):
        where = [
            int((whole.train.inputs == image).flatten(1).all(1).nonzero()[0]) for image in examples.inputs[:9]
        ]
        assert whole.train.labels[where].tolist() == examples.labels[:9].tolist(), "with its label"
        assert where == sorted(where)
    config = Config(max_train_examples=1000, validation_share=0.2)
    parts = [client_data(config, partition, 4) for partition in range(4)]
    assert sum(len(part) for part in parts) == 800
    assert all(part.dataset is split.train for part in parts)


def test_one_example_cannot_be_shared() -> None:
    with pytest.raises(ValueError, match=r"validation-share=0\.5: there are 1 training examples to share"):
        load_dataset("digits", 1, 0.5)


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
    text = name == "char-lm"
    inputs = torch.zeros(2, 16, dtype=torch.int64) if text else torch.zeros(2, 1, 16, 16)
    shape = tuple(inputs.shape[1:])
    classes = 2 if name == "logistic" else 10
    first, again, other = (build_model(name, shape, classes, seed, inputs.dtype) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first(inputs).shape == (2, classes)
    for p, q in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
    # Logistic regression always starts from 0.
    assert torch.equal(next(first.parameters()), next(other.parameters())) == (name == "logistic")


def test_logistic_regression_is_binary_and_its_loss_the_textbooks() -> None:
    model = build_model("logistic", (3,), 2, 0).double()
    theta, x = torch.tensor([[1.0, -2.0, 0.5]]).double(), torch.randn(6, 3).double()
    model.load_state_dict({"theta.weight": theta})
    y = torch.tensor([0, 1, 1, 0, 1, 0])
    expected = torch.log1p(torch.exp(-(2 * y - 1) * (x @ theta[0]))).mean()
    torch.testing.assert_close(nn.functional.cross_entropy(model(x), y), expected)
    with pytest.raises(ValueError, match="model='logistic' is for 2 classes, not 10; 'linear' takes any number"):
        build_model("logistic", (3,), 10, 0)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("cnn", (30,), "model='cnn' takes images of at least 4 x 4"),
        ("vit", (16,), "model='vit' takes images of at least 8 x 8"),
        ("vit", (1, 8, 4), r"model='vit' takes images of at least 8 x 8, not inputs of shape \(1, 8, 4\)"),
        ("vit", (1, 10, 8), r"model='vit' .* multiples of 4, not inputs of shape \(1, 10, 8\)"),
        ("vit", (3, 8, 9), r"model='vit' .* multiples of 4, not inputs of shape \(3, 8, 9\)"),
        (
            "char-lm",
            (16,),
            r"does not take features or images \(torch.float32\); .*: linear, logistic, mlp, .*, vit$",
        ),
    ],
)
def test_a_model_that_cannot_take_the_inputs_says_so(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(name, shape, 2, 0)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "char-lm"])
def test_only_char_lm_takes_text(name: str) -> None:
    message = rf"model='{name}' does not take text \(torch.int64\); models that do: char-lm$"
    with pytest.raises(ValueError, match=message):
        build_model(name, (16,), 9, 0, torch.int64)


def test_uint8_images_are_given_out_as_floats_and_whole_numbers_as_they_are() -> None:
    labels = torch.zeros(3, dtype=torch.int64)
    for dtype in (torch.uint8, torch.int64, torch.float32):
        given = torch.float32 if dtype == torch.uint8 else dtype
        examples = Examples(torch.arange(6).reshape(3, 2).to(dtype), labels)
        assert examples.input_dtype == examples[[1, 2]][0].dtype == examples[0][0].dtype == given
    assert Examples(torch.tensor([[7, 255, 300]]), labels[:1])[0][0].tolist() == [7, 255, 300]


def test_resnet18_has_group_norms_and_the_stem_for_small_images() -> None:
    model = build_model("resnet18-gn", (3, 32, 32), 7, 0)
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    assert len(norms) == 20
    assert {norm.num_groups for norm in norms} == {32}
    assert not any(isinstance(module, nn.BatchNorm2d | nn.MaxPool2d) for module in model.modules())
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    assert (first.kernel_size, first.stride, first.padding) == ((3, 3), (1, 1), (1, 1))


def test_a_block_of_the_vision_transformer_is_torchs_encoder_layer() -> None:
    torch.manual_seed(0)
    block = _Block().double()
    nn.init.normal_(block.attention.query_key_value.bias)  # torch's own starts at 0
    layer = nn.TransformerEncoderLayer(
        64, 4, 128, dropout=0, activation="gelu", batch_first=True, norm_first=True, dtype=torch.float64
    )
    ours = {
        "self_attn.in_proj_": block.attention.query_key_value,
        "self_attn.out_proj.": block.attention.output,
        "linear1.": block.mlp[0],
        "linear2.": block.mlp[2],
        "norm1.": block.attention_norm,
        "norm2.": block.mlp_norm,
    }
    layer.load_state_dict(
        {f"{name}{key}": value for name, module in ours.items() for key, value in module.state_dict().items()}
    )
    tokens = torch.randn(2, 5, 64, dtype=torch.float64)
    torch.testing.assert_close(block(tokens), layer(tokens))


def test_the_vision_transformer_sees_where_a_patch_is_and_all_of_them() -> None:
    model = build_model("vit", (3, 8, 12), 5, 0)
    assert isinstance(model, VisionTransformer)
    assert len(model.blocks) == 4
    assert model.positions.weight.shape == (6, 64)
    images = torch.randn(1, 3, 8, 12)
    outputs = model(images)
    assert outputs.shape == (1, 5)
    assert not torch.allclose(model(images.roll(4, dims=2)), outputs, atol=1e-6)
    nn.init.zeros_(model.positions.weight)
    torch.testing.assert_close(model(images.roll(4, dims=2)), model(images))
    for row in range(0, 8, 4):
        for column in range(0, 12, 4):
            other = images.clone()
            other[..., row : row + 4, column : column + 4] = 0
            assert not torch.allclose(model(other), model(images), atol=1e-6)
