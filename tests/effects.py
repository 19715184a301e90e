"""What importing modules does to a process that has Flower and PyTorch: ``python effects.py MODULE …``, as JSON.

Nothing may be imported here that a user's program does not import anyway.
"""

import atexit
import gc
import importlib
import json
import logging
import os
import pickle
import random
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import flwr.clientapp
import flwr.serverapp  # noqa: F401  # as a user's program has it, before anything is compared
import numpy as np
import torch

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_DOING = ("socket.connect", "subprocess.Popen", "os.system", "os.mkdir", "os.remove", "os.rename")
_THREADS = Path("/proc/self/task")


def state() -> dict[str, Any]:
    """What a process has one of, by name."""
    return {
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "path": list(sys.path),
        "hooks": [repr(hook) for hook in (sys.excepthook, sys.displayhook, threading.excepthook)],
        "signals": {signal.Signals(number).name: repr(signal.getsignal(number)) for number in (2, 13, 15)},
        "exit functions": atexit._ncallbacks(),
        "garbage collection": gc.get_threshold(),
        "Python's threads": [thread.name for thread in threading.enumerate()],
        "threads": len(list(_THREADS.iterdir())) if _THREADS.is_dir() else None,
        "warnings": [repr(entry) for entry in warnings.filters],
        "logging": {name: _settings(name) for name in ("", "flwr", "torch", "fedpm_flwr")},
        "random": hash(random.getstate()),
        "NumPy": [hash(pickle.dumps(np.random.get_state())), np.geterr(), np.get_printoptions()],
        **torch_state(),
    }


def torch_state() -> dict[str, Any]:
    """PyTorch's part of it."""
    return {
        "PyTorch's generator": hash(torch.get_rng_state().numpy().tobytes()),
        "PyTorch's threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "PyTorch's defaults": [str(torch.get_default_dtype()), str(torch.get_default_device())],
        "gradients": [torch.is_grad_enabled(), torch.is_anomaly_enabled()],
        "determinism": [torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic],
        "speed": [torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32],
        "precision": torch.get_float32_matmul_precision(),
        "CUDA": torch.cuda.is_initialized(),
    }


def _settings(name: str) -> list[Any]:
    logger = logging.getLogger(name)
    return [logger.level, logger.disabled, logger.propagate, [repr(handler) for handler in logger.handlers]]


def effects(names: list[str]) -> dict[str, Any]:
    """The modules that are new, what of ``state`` changed, and what was written, started or asked for."""
    done: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING:
            done.append(f"open {arguments[0]}")
        elif event in _DOING:
            done.append(f"{event} {arguments}")

    before, loaded = state(), set(sys.modules)
    sys.addaudithook(watch)
    for name in names:
        importlib.import_module(name)
    new, told = sorted(set(sys.modules) - loaded), list(done)
    after = state()
    changed = {key: [before[key], after[key]] for key in before if before[key] != after[key]}
    return {"new": new, "done": told, "changed": changed}


if __name__ == "__main__":
    print(json.dumps(effects(sys.argv[1:])))
