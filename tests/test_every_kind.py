"""One of each kind of client, in Flower's simulation over Ray: the same model as in one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .installed import ROOT


def test_clients_of_every_kind_train_together_on_ray_and_inline(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.every_kind", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "FLWR_HOME": str(tmp_path / "flwr"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("ray", "inline"))
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, two[key], rtol=0, atol=0, msg=key)
    told = json.loads((tmp_path / "metrics.json").read_text())
    assert told["ray"] == told["inline"]
    trained, evaluated = told["ray"]
    for row in trained.values():
        assert row["seen"] == pytest.approx(3.0), "the mean of 0 to 6: all but the last have trained"
    assert evaluated["2"]["loss"] < 0.9 * evaluated["1"]["loss"]
    left_out = [line for line in said.splitlines() if "left out the reply" in line]
    assert len(left_out) == 4, "of one client, in two runs of two rounds"
    assert all("(partition 7): it is an error: " in line for line in left_out)
    assert all("this client only evaluates" in line for line in left_out), "its words, whatever Ray puts around"
    assert "no reply held curvature" not in said
