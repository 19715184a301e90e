"""Short runs of the application on digits."""

import json
from collections.abc import Mapping
from pathlib import Path

import client_app
import server_app
from fedpm_flwr.config import Config
from fedpm_flwr.inline import Client, run_inline

Row = dict[str, float]


def digits(folder: Path, settings: Mapping[str, object], client: Client = client_app.app) -> list[Row]:
    """The rows of a short run of the application on digits, by four nodes."""
    given = {"num-server-rounds": 3, "alpha": 10.0, "model": "mlp", "output": str(folder), **settings}
    config = Config.from_run_config({**given, "state-folder": str(folder / "state")})
    run_inline(server_app.app, client, 4, config.to_run_config())
    rows: list[Row] = json.loads((folder / "metrics.json").read_text())
    return rows


def check_learns(folder: Path, settings: Mapping[str, object]) -> None:
    """The test loss falls in three rounds of all four clients, and in three of two of them."""
    for name, fraction in (("all", 1.0), ("half", 0.5)):
        rows = digits(folder / name, {**settings, "fraction-train": fraction})
        assert [row["clients"] for row in rows[1:]] == [4 * fraction] * 3
        assert rows[-1]["test-loss"] < rows[0]["test-loss"] - 0.02
