"""Local training and evaluation, on whatever device there is."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler, SequentialSampler

from .curvature import CurvatureError
from .optim import SecondOrder

Loss = Callable[[Tensor, Tensor], Tensor]
Batches = Iterable[tuple[Tensor, Tensor]]
_BLOWN_UP = 100.0
"""Times the loss at its beginning: a training with more at its end has diverged."""


@dataclass(frozen=True)
class FitResult:
    """What local training did: loss and accuracy over all examples and steps, and how many steps.

    ``diverged``: the loss or a parameter is not finite, or the mean loss of the last quarter of the steps is more
    than 100 times that of the first, or than 100 if that was below 1. A client that diverged has a model as far
    off as its activations are large, and so is its curvature: mixing would trust it more than all others.
    ``accuracy`` is NaN where targets are no labels.
    """

    loss: float
    accuracy: float
    steps: int
    diverged: bool


def fit(
    model: nn.Module,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    loss_fn: Loss,
    *,
    epochs: int = 1,
    steps: int = 0,
    device: torch.device | str = "cpu",
) -> FitResult:
    """Take ``steps`` local steps, or, where that is 0, ``epochs`` passes over the batches.

    ``loss_fn`` returns the mean over the batch. Curvature that cannot be inverted ends the training of
    a client whose loss is no longer finite; else it is raised.
    """
    model.train()
    total = torch.zeros((), device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    losses: list[Tensor] = []
    examples = taken = 0
    for inputs, targets in islice(_passes(batches, None if steps else epochs), steps or None):
        inputs, targets = on_device(model, inputs, targets, device)
        optimizer.zero_grad()
        outputs = model(inputs)
        loss = loss_fn(outputs, targets)
        if isinstance(optimizer, SecondOrder):
            optimizer.measure(loss, outputs)
        loss.backward()
        losses.append(loss.detach())
        total += losses[-1] * len(inputs)
        examples += len(inputs)
        labelled = not targets.is_floating_point()
        if labelled:
            correct += (outputs.argmax(dim=1) == targets).sum()
        try:
            optimizer.step()
        except CurvatureError:
            if torch.isfinite(loss):
                raise
            break
        taken += 1
    finite = torch.isfinite(total) and all(torch.isfinite(p).all() for p in model.parameters())
    return FitResult(
        loss=float(total) / max(examples, 1),
        accuracy=float(correct) / max(examples, 1) if examples and labelled else math.nan,
        steps=taken,
        diverged=not finite or _has_blown_up(losses),
    )


def _has_blown_up(losses: list[Tensor]) -> bool:
    if not losses:
        return False
    quarter = math.ceil(len(losses) / 4)
    first, last = torch.stack(losses[:quarter]).mean(), torch.stack(losses[-quarter:]).mean()
    return bool(last > _BLOWN_UP * first.clamp(min=1.0))


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Batches, loss_fn: Loss, device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """Mean loss per example, and the share of examples whose largest output is the target."""
    model.eval()
    loss = torch.zeros((), device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    examples = 0
    for inputs, targets in batches:
        inputs, targets = on_device(model, inputs, targets, device)
        outputs = model(inputs)
        loss += loss_fn(outputs, targets) * len(inputs)
        correct += (outputs.argmax(dim=1) == targets).sum()
        examples += len(inputs)
    return float(loss) / max(examples, 1), float(correct) / max(examples, 1)


def on_device(
    model: nn.Module, inputs: Tensor, targets: Tensor, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """A batch where the model is; floating-point inputs in the dtype of its parameters."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), inputs.dtype)
    return inputs.to(device, dtype if inputs.is_floating_point() else inputs.dtype), targets.to(device)


def loader(data: Dataset[Any], batch_size: int, seed: int | None = None) -> DataLoader[Any]:
    """Batches of this size (0: all at once), in an order given by the seed (None: as they lie).

    ``data`` is asked for a batch at a time, by a list of indices.
    """
    size = len(data)  # type: ignore[arg-type]  # torch's Dataset does not declare __len__
    order: Sampler[int] = SequentialSampler(range(size))
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    if generator is not None and size:  # an empty data set gives no batches; torch refuses to shuffle one
        order = RandomSampler(range(size), generator=generator)
    batches = BatchSampler(order, batch_size or max(size, 1), drop_last=False)
    return DataLoader(data, sampler=batches, batch_size=None, generator=generator)


def pick_device(name: str) -> torch.device:
    """The device of this name; ``auto`` is CUDA where there is one, else the CPU.

    Raises:
        ValueError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except Exception as error:  # each backend fails in its own way
        raise ValueError(f"device={name!r} is not usable here: {str(error).splitlines()[0]}") from error
    return device


def derive_seed(*parts: int) -> int:
    """One seed of 32 bits from several, such as the run's seed, the round and the partition."""
    return int(np.random.SeedSequence(parts[0], spawn_key=parts[1:]).generate_state(1)[0])


@contextmanager
def reproducible(seed: int, threads: int, device: torch.device) -> Iterator[None]:
    """Run with this seed for torch's generators and this many threads; both are put back after.

    ``device`` is the one that is used: the generators of other GPUs are not touched.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            # Not ``torch.manual_seed``, which seeds every GPU there is, and where there is none keeps a trace of
            # each call for the day that one turns up.
            torch.default_generator.manual_seed(seed)
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            elif device.type != "cpu":
                torch.get_device_module(device).manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(before)


def _passes(batches: Batches, epochs: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches over and over, or so many times; stops if there are none."""
    done = 0
    while epochs is None or done < epochs:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            return
        done += 1
