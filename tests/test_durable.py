"""Files of tensors: whole or not at all, and nothing is left of a writer that was killed."""

import signal
import subprocess
import sys
from pathlib import Path

import torch

from fedpm_flwr.checkpoint import Checkpoints
from fedpm_flwr.config import Config
from fedpm_flwr.durable import read_tensors, write_tensors
from fedpm_flwr.report import RunReport

KILLED = """
import resource, signal, sys, torch
from pathlib import Path
from fedpm_flwr.durable import write_tensors
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the system kills it at byte 100,000 of a file
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
write_tensors(Path(sys.argv[1]) / "1.safetensors", {"w": torch.ones(200_000)}, {})
"""


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_what_a_killed_writer_leaves_is_removed_by_the_next(tmp_path: Path) -> None:
    write_tensors(tmp_path / "1.safetensors", {"w": torch.zeros(2)}, {"of": "before"})
    ended = subprocess.run([sys.executable, "-c", KILLED, tmp_path], check=False)
    assert ended.returncode == -signal.SIGXFSZ
    assert len(names(tmp_path)) > 1
    assert read_tensors(tmp_path / "1.safetensors")[1] == {"of": "before"}
    write_tensors(tmp_path / "2.safetensors", {"w": torch.ones(2)}, {})
    assert names(tmp_path) == ["1.safetensors", "2.safetensors"]
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_somebody_elses_stays(tmp_path: Path) -> None:
    """An output folder may be one that holds other things too."""
    foreign = ["holiday.mp4.part", "model.safetensors.part", ".tmpxDNXfO"]
    for name in foreign:
        (tmp_path / name).write_text("years of work")
    RunReport(Config(), tmp_path).keep({"w": torch.zeros(2)}, 1)
    assert names(tmp_path) == sorted([*foreign, "config.toml", "model.safetensors"])


def test_where_checkpoints_are_only_read_nothing_is_removed(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, tmp_path], check=False)
    left = names(tmp_path)
    assert left
    Checkpoints(tmp_path).rounds()
    assert names(tmp_path) == left


def test_they_are_private_unless_told_otherwise(tmp_path: Path) -> None:
    write_tensors(tmp_path / "state.safetensors", {}, {})
    write_tensors(tmp_path / "model.safetensors", {}, {}, private=False)
    (tmp_path / "other").touch()
    modes = [(tmp_path / f"{name}").stat().st_mode & 0o777 for name in ("state.safetensors", "model.safetensors")]
    assert modes == [0o600, (tmp_path / "other").stat().st_mode & 0o777]
