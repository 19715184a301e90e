"""Under Flower's differential privacy in a ClientApp nothing but parameters leaves it."""

from pathlib import Path

import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod
from flwr.clientapp.typing import ClientAppCallable

import client_app
import server_app
from fedpm_flwr import messages
from fedpm_flwr.config import Config
from fedpm_flwr.inline import run_inline


class _OwnMod(LocalDpMod):
    def __call__(self, msg: Message, ctxt: Context, call_next: ClientAppCallable) -> Message:
        return call_next(msg, ctxt)


@pytest.mark.parametrize("mod", [LocalDpMod, _OwnMod])
@pytest.mark.parametrize("algorithm", ["fedpm", "fedpm-corrected", "scaffold", "fednew", "localnewton"])
def test_a_mod_lets_no_curvature_pass(
    mod: type[LocalDpMod], algorithm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    app = ClientApp(mods=[mod(10.0, 1.0, 1.0, 0.1)])
    app.train()(client_app.train)
    app.query(messages.PARTITION_ACTION)(client_app.partition)
    settings = {
        "algorithm": algorithm,
        "dataset": "breast-cancer",
        "model": "linear",
        "num-server-rounds": 1,
        "packed-arrays": False,
        "output": str(tmp_path / "run"),
        "state-folder": str(tmp_path / "state"),
    }
    config = Config.from_run_config(settings).to_run_config()
    if algorithm == "localnewton":
        run_inline(server_app.app, app, 2, config)
        assert (tmp_path / "run" / "model.safetensors").is_file()
    else:
        with pytest.raises(RuntimeError, match="no round gave a new model"):
            run_inline(server_app.app, app, 2, config)
        assert f"{mod.__name__} protects parameters, not curvature: take a strategy without" in caplog.text
