"""Where figures come from: which code, on what, by which command, when."""

import importlib.metadata
import subprocess
import sys
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

from .machine import machine


def provenance() -> dict[str, Any]:
    """Of what this process does; of folders of this machine, the command has the names alone."""
    return {
        "commit": _commit(),
        "flwr": importlib.metadata.version("flwr"),
        **machine(),
        "command": " ".join(Path(part).name if part.startswith("/") else part for part in sys.argv[1:]),
        "date": date.today().isoformat(),
    }


@cache
def _commit() -> str:
    # Runs that are kept are tracked files, and no change of the code.
    status = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)benchmarks/results")
    return _git("rev-parse", "--short=12", "HEAD") + ("+changes" if status else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()
