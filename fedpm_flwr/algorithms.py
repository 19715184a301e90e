"""Which client and which strategy make an algorithm. A new one is one file, and one line in ``REGISTRY``."""

from typing import Any

from . import corrected, strategy
from .config import Config
from .method import Job, Method, local_training, shared_by_strategies
from .optimizers import OPTIMIZERS
from .rivals import (
    fedadam,
    fedavg,
    fedavgm,
    fednew,
    fednl,
    fedns,
    fedpac,
    fedprox,
    fedsophia,
    giant,
    localnewton,
    ltda,
    pfedsop,
    scaffold,
)


def get_algorithm(name: str) -> Method:
    """The algorithm of this name, one of ``config.ALGORITHMS``."""
    return REGISTRY[name]


def settings_without_effect(config: Config) -> list[str]:
    """A line for each setting that was given another value than its default and that nothing reads."""
    given, default = config.to_run_config(), Config().to_run_config()
    method, who = get_algorithm(config.algorithm), f"algorithm={config.algorithm!r}"
    unread = []
    for key in _OF_SOME_METHODS:
        if key in method.reads or given[key] == default[key]:
            continue
        if key in _OF_SOME_OPTIMIZERS and method.reads_optimizer:
            if key not in OPTIMIZERS[config.optimizer].reads:
                unread.append((key, f"optimizer={config.optimizer!r}"))
        else:
            unread.append((key, who))
    return [f"{key}={given[key]!r} has no effect: {reader} does not read it" for key, reader in unread]


def _fedpm(config: Config, **more: Any) -> strategy.FedPM:
    return strategy.FedPM(
        server_learning_rate=config.server_learning_rate,
        codec=config.codec,
        max_factor_side=config.max_factor_side,
        max_payload_bytes=int(config.max_payload_mb * 1e6),
        kronecker_sum=config.kronecker_sum,
        device="cpu" if config.device == "mps" else config.device,  # which has no float64
        **shared_by_strategies(config),
        **more,
    )


REGISTRY = {
    "fedpm": Method(
        client=local_training(Job.second_order),
        strategy=_fedpm,
        reads=("server-learning-rate", "codec", "kronecker-sum", "max-payload-mb"),
        reads_optimizer=True,
    ),
    "fedpm-corrected": Method(
        client=corrected.client,
        strategy=lambda config: _fedpm(
            config, correction=config.correction, state_folder=config.state_folder or None
        ),
        reads=("server-learning-rate", "codec", "kronecker-sum", "max-payload-mb", "correction"),
        reads_optimizer=True,
    ),
    "localnewton": localnewton.METHOD,
    "fedavg": fedavg.METHOD,
    "fedpac": fedpac.METHOD,
    "pfedsop": pfedsop.METHOD,
    "fednl": fednl.METHOD,
    "fedns": fedns.METHOD,
    "giant": giant.METHOD,
    "fednew": fednew.METHOD,
    "fedavgm": fedavgm.METHOD,
    "fedprox": fedprox.METHOD,
    "fedadam": fedadam.METHOD,
    "scaffold": scaffold.METHOD,
    "ltda": ltda.METHOD,
    "fedsophia": fedsophia.METHOD,
}

_OF_SOME_OPTIMIZERS = tuple(dict.fromkeys(key for optimizer in OPTIMIZERS.values() for key in optimizer.reads))
_OF_SOME_METHODS = tuple(
    dict.fromkeys([*_OF_SOME_OPTIMIZERS, *(key for method in REGISTRY.values() for key in method.reads)])
)
