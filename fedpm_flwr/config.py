"""Every setting of the application: its name, default, meaning and allowed values, checked once.

The names are those of ``[tool.flwr.app.config]`` in pyproject.toml and of ``--run-config``.
"""

import dataclasses
import difflib
import json
import math
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Config", "ConfigError", "check_codec", "describe", "parse_settings", "settings_table"]

ALGORITHMS = (
    "fedpm",
    "fedpm-corrected",
    "localnewton",
    "fedavg",
    "fedpac",
    "pfedsop",
    "fednl",
    "fedns",
    "giant",
    "fednew",
    "fedavgm",
    "fedprox",
    "fedadam",
    "scaffold",
    "ltda",
    "fedsophia",
)
DATASETS = ("digits", "breast-cancer", "cifar10", "cifar100", "mnist", "fashion-mnist")
FILES = ("npz:", "libsvm:", "text:", "folder:")
"""What a dataset may start with instead; an absolute path follows."""
MODELS = ("cnn", "linear", "logistic", "mlp", "lenet", "resnet18-gn", "vit", "char-lm")
PARTITIONS = ("dirichlet", "iid", "contiguous")
DTYPES = ("float32", "float64")
OPTIMIZERS = ("foof", "kfac", "sophia", "ltda", "newton")
FISHERS = ("sampled", "exact", "empirical")
KRONECKER_SUMS = ("exact", "factored")
CORRECTED = ("control-variate", "fresh")
WEIGHTINGS = ("num-examples", "uniform")
UPDATES = ("none", "bfloat16", "int8")
COMPRESSORS = ("identity", "rank", "top")
INITIAL_HESSIANS = ("exact", "zero")
SKETCHES = ("gaussian", "hadamard")
CODECS = (
    "triangle-float64",
    "triangle-float32",
    "triangle-bfloat16",
    "triangle-int8",
    "positions",
    "diagonal",
    "rank-NUMBER",
    "rank-SHARE",
    "auto",
    "auto-SHARE",
)
"""A number from 1, as in ``rank-8``; a share, as in ``rank-0.9`` and ``auto-0.05``."""
_CODEC = re.compile(
    r"triangle-(float64|float32|bfloat16|int8)|positions|diagonal"
    r"|rank-[1-9]\d{0,6}|rank-0?\.(?!0+$)\d{1,9}|auto(-(?![0.]+$)\d{0,3}\.?\d{1,9})?"
)

Value = bool | int | float | str


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type, or outside its allowed values."""


def check_codec(codec: str) -> None:
    """Raises ConfigError if this is not the name of a codec."""
    if not _CODEC.fullmatch(codec):
        raise ConfigError(f"unknown codec {codec!r:.100}; allowed: {', '.join(CODECS)}")


def _setting(
    default: Value,
    meaning: str,
    *,
    choices: tuple[str, ...] = (),
    files: tuple[str, ...] = (),
    low: float | None = None,
    high: float = math.inf,
    above: float | None = None,
    pattern: re.Pattern[str] | None = None,
) -> Any:
    """A dataclass field with its meaning and its allowed values.

    These are choices, or one of ``files`` with an absolute path after it; low <= x <= high, x > above. A
    ``pattern`` says in full which texts the choices stand for.
    """
    limits = {"meaning": meaning, "choices": choices, "files": files, "low": low, "high": high, "above": above}
    return field(default=default, metadata=limits | {"pattern": pattern})


@dataclass(frozen=True)
class Config:
    """The configuration of one run. Units and symbols stand in each setting's meaning."""

    algorithm: str = _setting("fedpm", "what the server and the clients do", choices=ALGORITHMS)
    dataset: str = _setting("digits", "which data", choices=DATASETS, files=FILES)
    max_train_examples: int = _setting(0, "only the first so many training examples, as they lie; 0: all", low=0)
    validation_share: float = _setting(
        0.0,
        "share of the dataset's training examples that no partition has, tested on instead of the test set",
        low=0,
        high=0.9,
    )
    augment: bool = _setting(False, "training images moved by up to 4 pixels and mirrored, as usual for CIFAR")
    model: str = _setting("cnn", "which network", choices=MODELS)
    initial_model: str = _setting("", "start from this .safetensors file instead; absolute path")
    reference_model: str = _setting("", "tell each round's distance to this .safetensors file; absolute path")
    num_server_rounds: int = _setting(20, "communication rounds", low=1)
    fraction_train: float = _setting(1.0, "share of the nodes that train in a round", above=0, high=1)
    fraction_evaluate: float = _setting(
        0.0, "share of the nodes that evaluate the global model on their own data", low=0, high=1
    )
    min_available_nodes: int = _setting(2, "nodes to wait for before a round starts", low=1)
    round_timeout: float = _setting(3600.0, "seconds that clients have to reply in", above=0)
    min_replies: int = _setting(1, "usable replies without which a round does not count", low=1)
    max_failed_rounds: int = _setting(3, "rounds in a row that do not count, at which the run stops", low=1)
    local_epochs: int = _setting(2, "passes over a client's data in a round", low=1)
    local_steps: int = _setting(0, "K, local steps in a round; 0: as local-epochs says", low=0)
    batch_size: int = _setting(32, "examples in a local step; 0: all the client has", low=0)
    optimizer: str = _setting("foof", "the local second-order steps, and so the P of a layer", choices=OPTIMIZERS)
    learning_rate: float = _setting(0.1, "eta, length of a local step", above=0)
    plain_learning_rate: float = _setting(0.0, "eta of parameters without a P; 0: as learning-rate", low=0)
    server_learning_rate: float = _setting(1.0, "eta_s, length of the server's step", above=0)
    damping: float = _setting(0.1, "lambda, added to P; unit: P's, for foof a squared activation", low=0)
    relative_damping: bool = _setting(False, "lambda in units of the mean eigenvalue of a layer's P")
    momentum: float = _setting(0.0, "mu, of the preconditioned updates", low=0, high=1)
    weight_decay: float = _setting(0.0, "omega, pulls parameters to 0", low=0)
    decoupled_weight_decay: bool = _setting(False, "omega shrinks the parameters, is no part of the gradient")
    clip: float = _setting(0.0, "largest norm of the update of all parameters, before eta; 0: any", low=0)
    ema: float = _setting(0.95, "how much less a P counts in the average with each newer one", low=0, high=1)
    refresh_interval: int = _setting(2, "local steps between two measurements of P", low=1)
    inverse_interval: int = _setting(2, "local steps between two inversions of P + lambda I", low=1)
    max_factor_side: int = _setting(8192, "layers with more inputs get the identity", low=1)
    position_stride: int = _setting(1, "P from every so many-th position of an image, in each direction", low=1)
    fisher: str = _setting("sampled", "kfac: whose gradients its left factor is of", choices=FISHERS)
    sophia_gamma: float = _setting(0.01, "sophia: the larger, the fewer entries are clipped", above=0)
    kronecker_sum: str = _setting("exact", "mixing of kfac's P; factored: approximate", choices=KRONECKER_SUMS)
    correction: str = _setting(
        "control-variate",
        "fedpm-corrected: the pair of the last round, or, by two exchanges, fresh",
        choices=CORRECTED,
    )
    max_payload_mb: float = _setting(1000.0, "fedpm: replies with more MB of curvature are left out", above=0)
    weighting: str = _setting("num-examples", "w_i, how much a client counts", choices=WEIGHTINGS)
    codec: str = _setting("triangle-float32", "how P travels", choices=CODECS, pattern=_CODEC)
    packed_arrays: bool = _setting(True, "a model travels as one array per dtype, not one per parameter")
    update: str = _setting("none", "in what bits a client's change of the model travels", choices=UPDATES)
    # Of single rivals.
    proximal_mu: float = _setting(0.01, "fedprox: mu_p, how strongly local steps are held near theta", low=0)
    server_momentum: float = _setting(0.9, "fedavgm: mu_s, of the server's steps", low=0, high=1)
    adam_eta: float = _setting(0.1, "fedadam: eta_a, length of the server's step", above=0)
    adam_beta_1: float = _setting(0.9, "fedadam: how much the mean of updates keeps", low=0, high=0.9999)
    adam_beta_2: float = _setting(0.99, "fedadam: how much the mean of squared updates keeps", low=0, high=0.9999)
    adam_tau: float = _setting(0.001, "fedadam: added to the root of the mean square", above=0)
    fednl_option: int = _setting(1, "fednl: 1 raises H's small eigenvalues, 2 adds its error", low=1, high=2)
    hessian_learning_rate: float = _setting(1.0, "fednl: alpha, how much of C(D) a client's H takes on", above=0)
    hessian_floor: float = _setting(0.001, "fednl: mu, the least eigenvalue of H in option 1", above=0)
    initial_hessian: str = _setting("exact", "fednl: a client's first H", choices=INITIAL_HESSIANS)
    compressor: str = _setting("rank", "fednl: C, what of a difference of Hessians travels", choices=COMPRESSORS)
    compressor_size: int = _setting(1, "fednl: eigenpairs of rank, entries of top", low=1)
    sketch: str = _setting("hadamard", "fedns: S, by which roots of Hessians are shortened", choices=SKETCHES)
    sketch_size: int = _setting(256, "fedns: s, rows of a sketch; roots with fewer travel whole", low=1)
    line_search_steps: int = _setting(10, "giant: step lengths to try, each half the last; 0: none", low=0)
    fednew_rho: float = _setting(0.1, "fednew: rho, ADMM's penalty; unit: the Hessian's", low=0)
    fednew_refresh: int = _setting(1, "fednew: rounds between two Hessians; 0: only the first", low=0)
    fedpac_align: bool = _setting(True, "fedpac: clients start from the mean of all P")
    fedpac_beta: float = _setting(0.5, "fedpac: share of the last global step in a local one", low=0, high=1)
    personal_learning_rate: float = _setting(1.0, "pfedsop: eta_1, length of a personal step", low=0)
    personal_sharpness: float = _setting(5.0, "pfedsop: how sharply the angle between updates decides", above=0)
    partition: str = _setting("dirichlet", "how data is split among clients", choices=PARTITIONS)
    alpha: float = _setting(0.1, "Dirichlet concentration; small: one client, few labels", above=0)
    seed: int = _setting(0, "of the partition, initial model, sampling, batches", low=0, high=2**32 - 1)
    device: str = _setting("auto", "auto (CUDA where there is one), cpu, cuda, cuda:N, mps")
    dtype: str = _setting("float32", "of the model; float64 is for small convex problems", choices=DTYPES)
    threads: int = _setting(1, "torch threads of a client and of the server", low=1)
    state_folder: str = _setting("", "absolute folder of what clients keep between rounds; empty: a temporary one")
    tensorboard: bool = _setting(False, "metrics also as TensorBoard's events; needs the package tensorboard")
    checkpoint_every: int = _setting(0, "rounds between two checkpoints of the server, in output; 0: none", low=0)
    checkpoint_keep: int = _setting(3, "how many checkpoints are kept", low=1)
    resume: str = _setting("", "absolute output folder of a run that broke off, to go on with")
    output: str = _setting("", "absolute folder for results; empty: resume's, or runs/<date-time>-<algorithm>")

    def __post_init__(self) -> None:
        for setting in dataclasses.fields(self):
            value = _cast(setting, getattr(self, setting.name))
            _check(setting, value)
            object.__setattr__(self, setting.name, value)
        if self.update != "none" and not self.packed_arrays:
            raise ConfigError(f"update={self.update!r} needs packed-arrays=true")
        for key in ("output", "resume", "initial_model", "reference_model", "state_folder", "dataset"):
            value = getattr(self, key)
            path = value.partition(":")[2] if key == "dataset" else value
            if path and not Path(path).is_absolute():
                raise ConfigError(
                    f"{key.replace('_', '-')}={value!r} is not an absolute path: a relative one would start "
                    "from the folder of the SuperLink, which need not be yours"
                )

    @classmethod
    def from_run_config(cls, run_config: Mapping[str, Any]) -> "Config":
        """Parse Flower's ``context.run_config``.

        Raises:
            ConfigError: naming the key, its value and what is allowed.
        """
        types = {_key(setting): setting for setting in dataclasses.fields(cls)}
        unknown = sorted(set(run_config) - set(types))
        if unknown:
            near = difflib.get_close_matches(unknown[0], types, n=1)
            meant = f" (do you mean {near[0]!r}?)" if near else ""
            raise ConfigError(f"unknown setting {unknown[0]!r}{meant}; allowed: {', '.join(types)}")
        return cls(**{types[key].name: run_config[key] for key in run_config})

    def changed_since(self, before: Mapping[str, Any]) -> list[str]:
        """A line for each setting that is not as it was, where that is not the point of taking a run up again."""
        now = self.to_run_config()
        return [
            f"{key}={now[key]!r}, where the run had {before[key]!r}"
            for key in before
            if key in now and now[key] != before[key] and key not in ("output", "resume", "num-server-rounds")
        ]

    def check_nodes(self, nodes: int) -> None:
        """Raises ConfigError if so few nodes can never make a round of this configuration."""
        if self.min_available_nodes > nodes:
            raise ConfigError(f"min-available-nodes={self.min_available_nodes}, but there are {nodes} --nodes")
        trained = max(int(nodes * self.fraction_train), 1)
        if self.min_replies > trained:
            raise ConfigError(f"min-replies={self.min_replies}, but {trained} clients train in a round")

    def to_run_config(self) -> dict[str, Value]:
        """The settings under their kebab-case names."""
        return {_key(setting): getattr(self, setting.name) for setting in dataclasses.fields(self)}

    def to_toml(self) -> str:
        """A file that ``flwr run . --run-config FILE`` accepts (JSON scalars are TOML scalars)."""
        return "".join(
            f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in self.to_run_config().items()
        )


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """``KEY=VALUE`` as typed on a command line, VALUE in TOML; what is none is text, since shells eat quotes.

    Examples:
        >>> parse_settings(["alpha=0.5", "algorithm=fedavg"])
        {'alpha': 0.5, 'algorithm': 'fedavg'}

    Raises:
        ConfigError: a setting is not of this form.
    """
    values = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"{setting!r} is not of the form KEY=VALUE")
        try:
            values[key] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            values[key] = text
    return values


def settings_table() -> list[tuple[str, str, str, str]]:
    """Of each setting its name, default (as JSON), allowed values and meaning."""
    return [
        (_key(row), json.dumps(row.default), _allowed(row), row.metadata["meaning"])
        for row in dataclasses.fields(Config)
    ]


def describe() -> str:
    """One line a setting: name, default, allowed values, meaning."""
    return "\n".join(
        f"{key} = {default}  ({allowed}): {meaning}" for key, default, allowed, meaning in settings_table()
    )


def _key(setting: "dataclasses.Field[Any]") -> str:
    return setting.name.replace("_", "-")


def _cast(setting: "dataclasses.Field[Any]", value: Any) -> Any:
    """TOML writes 1 where a float is meant; nothing else is converted."""
    if setting.type is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) <= sys.float_info.max else math.inf
    return value


def _check(setting: "dataclasses.Field[Any]", value: Any) -> None:
    limits = setting.metadata
    right_type = type(value) is setting.type
    if limits["pattern"]:
        in_choices = isinstance(value, str) and limits["pattern"].fullmatch(value) is not None
    else:
        in_choices = not limits["choices"] or value in limits["choices"] or _is_file(limits["files"], value)
    if right_type and in_choices and (not isinstance(value, int | float) or _in_range(limits, value)):
        return
    raise ConfigError(f"{_key(setting)}={value!r} is not allowed; allowed: {_allowed(setting)}")


def _is_file(prefixes: tuple[str, ...], value: Any) -> bool:
    return isinstance(value, str) and any(value.startswith(prefix) and value != prefix for prefix in prefixes)


def _in_range(limits: Mapping[str, Any], value: float) -> bool:
    low, high, above = limits["low"], limits["high"], limits["above"]
    return (
        math.isfinite(value)
        and (low is None or value >= low)
        and (above is None or value > above)
        and value <= high
    )


def _allowed(setting: "dataclasses.Field[Any]") -> str:
    limits = setting.metadata
    if limits["choices"]:
        return " | ".join([*limits["choices"], *(f"{prefix}/path/to/file" for prefix in limits["files"])])
    kinds: dict[Any, str] = {bool: "true | false", int: "whole number", float: "number", str: "text"}
    parts = [kinds[setting.type]]
    if limits["low"] is not None:
        parts.append(f">= {limits['low']}")
    if limits["above"] is not None:
        parts.append(f"> {limits['above']}")
    if limits["high"] != math.inf:
        parts.append(f"<= {limits['high']}")
    return parts[0] if len(parts) == 1 else f"{parts[0]} {' and '.join(parts[1:])}"
