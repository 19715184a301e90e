"""Runs of the application in Flower's own simulation."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fedpm_flwr.config import Config
from fedpm_flwr.report import PREFIX

from .runs import Rounds, read_rounds

_CHECKOUT = Path(__file__).resolve().parent.parent


def run_on_ray(configs: Sequence[Config], nodes: int) -> dict[str, Rounds]:
    """The rounds of each run that succeeded, by its output folder; says which did not."""
    done = {}
    for config in configs:
        settings = [f"{key}={json.dumps(value)}" for key, value in config.to_run_config().items()]
        command = [sys.executable, "-m", "scripts.simulate", "--nodes", str(nodes), *settings]
        if subprocess.run(command, stdout=subprocess.DEVNULL, cwd=_CHECKOUT).returncode == 0:
            done[config.output] = read_rounds(Path(config.output))
        else:
            print(f"{PREFIX}left out of the table, since it failed: {Path(config.output).name}", file=sys.stderr)
    return done
