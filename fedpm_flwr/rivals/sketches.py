"""Random sketches S [s, m] with E[SᵀS] = I, by name: SA is a short matrix with nearly A's Gram matrix."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def gaussian(matrix: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """SA [s, d] of A [m, d]: independent entries of S from N(0, 1/s)."""
    drawn = torch.randn(size, len(matrix), generator=generator, dtype=matrix.dtype)
    return (drawn / math.sqrt(size)).to(matrix.device) @ matrix


def hadamard(matrix: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """SA [s, d] of A [m, d], the subsampled randomised Hadamard transform: S = √(M/s) R W D.

    M is the power of two from m on, and A is padded to it by zeros; D random signs, W the orthonormal
    Hadamard matrix, R takes s ≤ M of the rows without replacement. With s = M nothing is lost.
    """
    rows = 1 << (len(matrix) - 1).bit_length()
    signs = torch.randint(0, 2, (len(matrix), 1), generator=generator).to(matrix) * 2 - 1
    mixed = torch.cat([matrix * signs, matrix.new_zeros(rows - len(matrix), matrix.shape[1])])
    kept = torch.randperm(rows, generator=generator)[:size].to(matrix.device)
    return _walsh_hadamard(mixed)[kept] / math.sqrt(size)  # √(M/s) · 1/√M


def _walsh_hadamard(matrix: Tensor) -> Tensor:
    """The Hadamard matrix of ±1 [M, M] times this one [M, d], M a power of two: M log M operations a column."""
    rows, half = len(matrix), 1
    while half < rows:
        pairs = matrix.reshape(rows // (2 * half), 2, half, -1)
        first, second = pairs[:, 0], pairs[:, 1]
        matrix = torch.stack([first + second, first - second], dim=1).reshape(rows, -1)
        half *= 2
    return matrix


SKETCHES: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "gaussian": gaussian,
    "hadamard": hadamard,
}
"""What ``sketch`` names."""
