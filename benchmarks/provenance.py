"""Where figures come from: which code, on what, by which command, when."""

import importlib.metadata
import re
import shlex
import subprocess
import sys
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

from .machine import machine

_FOLDERS = re.compile(r"(?<![^=:,])/(?:[^/=:,]+/)*(?=[^/=:,])")
"""Those before the last name of an absolute path, wherever it begins, as in dataset=npz:/DATA/cifar10.npz."""


def provenance() -> dict[str, Any]:
    """Of what this process does; of folders of this machine, the command has the names alone.

    The commit is that of the first time that it was asked for.
    """
    return {
        "commit": commit(),
        "flwr": importlib.metadata.version("flwr"),
        **machine(),
        "command": shlex.join(_FOLDERS.sub("", part) for part in sys.argv[1:]),
        "date": date.today().isoformat(),
    }


@cache
def commit() -> str:
    """Of this checkout, with ``+changes`` if it has any; "unknown": it is none, or there is no git."""
    # Runs that are kept are tracked files, and no change of the code.
    status = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)benchmarks/results")
    head = _git("rev-parse", "--short=12", "HEAD")
    return head + ("+changes" if status else "") if head else "unknown"


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip()
