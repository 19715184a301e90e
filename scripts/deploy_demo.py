"""A federation of three sites on this machine, from keys to a trained model, and nothing left behind.

    python -m scripts.deploy_demo [KEY=VALUE ...]

Makes a CA, the server's certificate and a key for each site; cuts scikit-learn's digits into three files, one a
site; starts a SuperLink (gRPC, TLS, authenticated nodes) and three SuperNodes; submits the application and shows
its lines. KEY=VALUE are settings of the run. Keys, data and logs stay in `federation/` of the output folder.
"""

import argparse
import signal
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from fedpm_flwr.config import Config, ConfigError, parse_settings
from fedpm_flwr.report import PREFIX
from fedpm_flwr.tasks import client_data

from .certificates import make
from .federation import Federation
from .processes import CHECKOUT, exit_on_signals

SITES = ("lab", "clinic", "bank")
_DEFAULTS: dict[str, Any] = {"alpha": 1.0, "num-server-rounds": 5, "checkpoint-every": 1}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.deploy_demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    try:
        config = _config(parser.parse_args().settings)
    except ConfigError as error:
        print(f"{PREFIX}{error}", file=sys.stderr)
        return 2
    exit_on_signals()
    try:
        status = deploy(config)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (OSError, RuntimeError, ValueError) as error:
        print(f"{PREFIX}{error}", file=sys.stderr)
        return 1
    if status == "finished:completed":
        return 0
    logs = Path(config.output) / "federation"
    print(f"{PREFIX}the run did not complete ({status}); the logs are in {logs}", file=sys.stderr)
    return 1


def _config(settings: list[str]) -> Config:
    folder = CHECKOUT / "runs" / f"{datetime.now():%Y%m%d-%H%M%S}-deploy-demo"
    given = {"min-available-nodes": len(SITES), "output": str(folder), **_DEFAULTS, **parse_settings(settings)}
    config = Config.from_run_config(given)
    config.check_nodes(len(SITES))
    return config


def deploy(config: Config) -> str:
    """The whole of it; returns Flower's word on how the run ended.

    Raises:
        OSError: a folder cannot be written to, or is of an earlier run.
        ValueError: the data cannot be used.
        RuntimeError: one of Flower's commands failed.
    """
    folder = Path(config.output) / "federation"
    if folder.exists():
        raise FileExistsError(f"{folder} is of an earlier demonstration; output= names another folder")
    certificates = folder / "certificates"
    make(certificates, ["localhost", "127.0.0.1"], list(SITES))
    data = write_data(folder / "data", config)
    print(f"{PREFIX}starting a SuperLink and {len(SITES)} SuperNodes (gRPC, TLS, authenticated)", flush=True)
    with Federation(folder, certificates) as federation:
        for number, site in enumerate(SITES):
            federation.register(site)
            place = f'partition-id={number} num-partitions={len(SITES)} data-path="{data[site]}"'
            federation.start_node(site, f'{place} state-folder="{folder / "state" / site}"')
        return federation.run(config)


def write_data(folder: Path, config: Config) -> dict[str, Path]:
    """Each site's own examples, as a .npz file."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {site: folder / f"{site}.npz" for site in SITES}
    for number, path in enumerate(paths.values()):
        part = client_data(config, number, len(SITES))
        inputs, labels = part.dataset[part.indices]
        np.savez(path, x_train=inputs.numpy(), y_train=labels.numpy())
    return paths


if __name__ == "__main__":
    sys.exit(main())
