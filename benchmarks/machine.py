"""The machine that figures come from: what it is, and how fast memory and products are on it."""

import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

_TRIES = 5
_BUFFER_BYTES = 1 << 28
_PRODUCT_SIDE = 1024


def machine() -> dict[str, str | int]:
    """Where the figures come from."""
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count() or 0,
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def peak_bytes() -> int:
    """The largest resident memory that this process has had."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would count what the parent had when it started this process
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_bandwidth(threads: int) -> float:
    """Bytes a second, read and written, of a copy that no cache holds; the best of several."""
    torch.set_num_threads(threads)
    source = torch.ones(_BUFFER_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * _BUFFER_BYTES / _least_seconds(lambda: target.copy_(source))


def product_rate(threads: int) -> float:
    """Floating-point operations a second of a matrix product in float64; the best of several."""
    torch.set_num_threads(threads)
    matrix = torch.randn(_PRODUCT_SIDE, _PRODUCT_SIDE, dtype=torch.float64)
    return 2 * _PRODUCT_SIDE**3 / _least_seconds(lambda: matrix @ matrix)


def _least_seconds(action: Callable[[], object]) -> float:
    taken = []
    for _ in range(_TRIES):
        start = time.perf_counter()
        action()
        taken.append(time.perf_counter() - start)
    return min(taken)
