"""How a client measures its curvature. One way, one file."""

from collections.abc import Collection
from typing import Protocol

from ..curvature import Block, Curvature
from .diagonals import FirstRow, GaussNewtonBartlett, Hutchinson
from .hessian import MATRICES, ExactHessian
from .input_covariance import InputCovariance
from .kfac import FISHERS, KroneckerFactors
from .likelihood import LOSSES
from .positive import absolute


class Estimator(Protocol):
    """What measures P, either by hooks in the forward pass or by ``measure(loss, outputs)``."""

    recording: Collection[Block]
    """The blocks to measure; the rest pass at no cost."""

    @property
    def signed(self) -> bool:
        """Whether P may be indefinite; then it is averaged as it is, and made positive after (``absolute``)."""

    @property
    def blocks(self) -> list[Block]:
        """The groups of parameters that have a P."""

    def collect(self) -> dict[Block, Curvature]:
        """P of each block over all that was seen since the last call; what saw nothing is left out."""

    def detach(self) -> None:
        """Take the hooks off the model, if there are any."""


__all__ = [
    "FISHERS",
    "LOSSES",
    "MATRICES",
    "Estimator",
    "ExactHessian",
    "FirstRow",
    "GaussNewtonBartlett",
    "Hutchinson",
    "InputCovariance",
    "KroneckerFactors",
    "absolute",
]
