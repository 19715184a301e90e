"""The distributions, built as for a release, and an environment that holds the wheel instead of the checkout."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_OURS = shutil.ignore_patterns(
    ".venv*", ".git", "runs", "*_cache", ".hypothesis", "__pycache__", "dist", "site"
)
EXTRAS = ("datasets", "flwr_datasets", "matplotlib", "psutil", "ray", "sklearn", "tensorboard", "torchvision")
"""Modules that only fedpm-flwr's extras bring."""


def build(checkout: Path, folder: Path) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(checkout)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def install(wheel: Path, folder: Path) -> Path:
    """The Python of a new environment: the wheel, and links to this one's packages, but to none of ``EXTRAS``."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", str(python)]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", wheel], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        # Without .pth files, by one of which the checkout is installed.
        if entry.name not in EXTRAS and entry.suffix != ".pth" and not (packages / entry.name).exists():
            (packages / entry.name).symlink_to(entry)
    return python
