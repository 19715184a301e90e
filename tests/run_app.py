"""Run a Flower app's folder in this process, with three clients, and tell what these have replied.

    python tests/run_app.py FOLDER RUN_CONFIG_AS_JSON

The last line is a list in JSON: of each reply the metrics, the names of its arrays, and those that it has
curvature of.
"""

import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.supercore.object_ref import load_app

from fedpm_flwr.inline import run_inline
from fedpm_flwr.wire import decode


def main(folder: Path, changes: dict[str, str | int]) -> None:
    settings = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    server, client = (
        load_app(settings["components"][name], ImportError, folder) for name in ("serverapp", "clientapp")
    )
    told = []

    def watched(message: Message, context: Context) -> Message:
        reply: Message = client(message, context)
        told.append(contents(reply))
        return reply

    torch.manual_seed(0)
    torch.set_num_threads(1)
    run_inline(server, watched, 3, settings["config"] | changes, seed=0)
    print(json.dumps(told))


def contents(reply: Message) -> dict[str, Any]:
    records = reply.content
    shapes = {key: array.shape for record in records.array_records.values() for key, array in record.items()}
    payloads = [record["payload"] for record in records.config_records.values() if "payload" in record]
    layers = [layer for payload in payloads if isinstance(payload, bytes) for layer in decode(payload, shapes)]
    return {
        "metrics": dict(records.metric_records["metrics"]),
        "arrays": sorted(shapes),
        "curvature": sorted(key for layer in layers for key in layer.block.parameters),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
