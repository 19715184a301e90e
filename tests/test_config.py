"""Settings: parsed and checked in one place, with errors that name key, value and what is allowed."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpm_flwr import config as settings
from fedpm_flwr.algorithms import REGISTRY
from fedpm_flwr.config import Config, ConfigError, describe
from fedpm_flwr.estimators import FISHERS
from fedpm_flwr.optimizers import OPTIMIZERS
from fedpm_flwr.rivals.compressors import COMPRESSORS
from fedpm_flwr.rivals.sketches import SKETCHES
from fedpm_flwr.tasks.datasets import _LOADERS
from fedpm_flwr.tasks.files import LOADERS
from fedpm_flwr.tasks.models import _MODELS

ROOT = Path(__file__).resolve().parent.parent


def test_pyproject_has_every_setting_with_its_default() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["flwr"]["app"]["config"] == Config().to_run_config()


def test_the_names_that_config_allows_are_those_that_exist() -> None:
    assert set(settings.ALGORITHMS) == set(REGISTRY)
    assert set(settings.OPTIMIZERS) == set(OPTIMIZERS)
    assert set(settings.FISHERS) == set(FISHERS)
    assert set(settings.DATASETS) == set(_LOADERS)
    assert set(settings.FILES) == {f"{prefix}:" for prefix in LOADERS}
    assert set(settings.MODELS) == set(_MODELS)
    assert set(settings.COMPRESSORS) == set(COMPRESSORS)
    assert set(settings.SKETCHES) == set(SKETCHES)


def test_values_are_parsed_and_whole_numbers_serve_as_numbers() -> None:
    config = Config.from_run_config({"learning-rate": 1, "num-server-rounds": 3, "algorithm": "fedavg"})
    assert (config.learning_rate, config.num_server_rounds, config.algorithm) == (1.0, 3, "fedavg")
    assert isinstance(config.learning_rate, float)


def test_in_python_too_whole_numbers_serve_as_numbers() -> None:
    assert Config(learning_rate=1) == Config(learning_rate=1.0)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("algorithm", "fedsgd", r"algorithm='fedsgd' is not allowed; allowed: fedpm \| fedpm-corrected"),
        ("learning-rate", 0, "learning-rate=0.0 is not allowed; allowed: number > 0"),
        ("learning-rate", float("nan"), "learning-rate=nan"),
        ("learning-rate", float("inf"), "learning-rate=inf"),
        ("learning-rate", 10**400, "learning-rate=inf"),
        ("learning-rate", "fast", "learning-rate='fast' is not allowed; allowed: number > 0"),
        ("damping", -0.1, "damping=-0.1 is not allowed; allowed: number >= 0"),
        ("fraction-train", 1.5, "fraction-train=1.5 is not allowed; allowed: number > 0 and <= 1"),
        ("num-server-rounds", 2.5, "num-server-rounds=2.5 is not allowed; allowed: whole number >= 1"),
        ("num-server-rounds", True, "num-server-rounds=True is not allowed"),
        ("batch-size", -1, "batch-size=-1 is not allowed; allowed: whole number >= 0"),
        ("ema", 1.1, "ema=1.1"),
        ("seed", 2**32, "seed=4294967296"),
        ("device", 3, "device=3 is not allowed; allowed: text"),
        ("output", "runs/mine", "output='runs/mine' is not an absolute path"),
        ("dataset", "text:my.txt", "dataset='text:my.txt' is not an absolute path"),
        ("dataset", "text:", r"dataset='text:' is not allowed; .*\| text:/path/to/file"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(key: str, value: object, allowed: str) -> None:
    with pytest.raises(ConfigError, match=allowed):
        Config.from_run_config({key: value})


def test_an_unknown_key_is_named_with_all_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"unknown setting 'nonsense'; allowed: algorithm, .*learning-rate"):
        Config.from_run_config({"nonsense": 0.1})
    with pytest.raises(
        ConfigError, match=r"'learning_rate' \(do you mean 'learning-rate'\?\); allowed: algorithm, "
    ):
        Config.from_run_config({"learning_rate": 0.1})


@given(
    rounds=st.integers(1, 1000),
    rate=st.floats(1e-6, 10),
    algorithm=st.sampled_from(settings.ALGORITHMS),
    output=st.from_regex(r'/[a-z"\\ é🙂]{0,9}', fullmatch=True),
)
def test_the_configuration_as_run_can_be_run_again(rounds: int, rate: float, algorithm: str, output: str) -> None:
    config = Config(num_server_rounds=rounds, learning_rate=rate, algorithm=algorithm, output=output)
    assert Config.from_run_config(tomllib.loads(config.to_toml())) == config


def test_every_setting_is_described() -> None:
    lines = describe().splitlines()
    assert [line.split(" = ")[0] for line in lines] == list(Config().to_run_config())
