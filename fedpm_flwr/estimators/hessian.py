"""The exact Hessian, or Gauss-Newton matrix, of a small model."""

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor, nn

from ..curvature import Block, Curvature, Dense, to_matrix, weighted_sum
from .blocks import derivatives, model_block

MATRICES = ("hessian", "ggn")
_ROWS_AT_A_TIME = 256


class ExactHessian:
    """H = ∂²loss/∂θ² over all trainable parameters together, or the Gauss-Newton matrix Jᵀ H_z J.

    z are the model's outputs, J their derivatives by θ, and H_z the Hessian of the loss by z. Both are
    those of the very loss that is given, its regularisation included.

    ``measure(loss, outputs)`` before ``loss.backward()``: one vector-Jacobian product for each
    parameter (``hessian``) or each parameter and output (``ggn``), 256 at a time.

    Args:
        model: whose parameters are measured.
        matrix: ``hessian`` or ``ggn``.
        parameters: those to measure; by default all. Frozen ones never are.
        max_side: the largest number of parameters.

    Raises:
        ValueError: there are more, or the matrix is unknown.
    """

    signed = True

    def __init__(
        self,
        model: nn.Module,
        matrix: str = "hessian",
        parameters: Iterable[nn.Parameter] | None = None,
        max_side: int = 8192,
    ) -> None:
        if matrix not in MATRICES:
            raise ValueError(f"unknown matrix {matrix!r}; allowed: {', '.join(MATRICES)}")
        self._block, self._parameters = model_block(model, parameters)
        size = sum(p.numel() for p in self._parameters)
        if size > max_side:
            raise ValueError(f"an exact matrix of {size} parameters, more than {max_side}: take a smaller model")
        self._matrix = matrix
        self._measured: list[Curvature] = []
        self.recording: Collection[Block] = self.blocks

    @property
    def blocks(self) -> list[Block]:
        """One block, of all trainable parameters."""
        return [self._block] if self._parameters else []

    def measure(self, loss: Tensor, outputs: object = None) -> None:
        """Measure at the current parameters.

        Raises:
            TypeError: the Gauss-Newton matrix is asked for without the outputs, a tensor that the loss depends on.
        """
        if not self.recording:
            return
        if self._matrix == "hessian":
            flat = self._flat(derivatives(loss, self._parameters, create_graph=True))
            matrix = self._rows(flat)
        else:
            if not isinstance(outputs, Tensor):
                raise TypeError("the Gauss-Newton matrix needs measure(loss, outputs), outputs being one tensor")
            jacobian = self._rows(outputs.flatten())  # [outputs, parameters]
            (slope,) = torch.autograd.grad(loss, outputs, create_graph=True)
            if not slope.requires_grad:  # a loss that is linear in the outputs
                matrix = jacobian.new_zeros(jacobian.shape[1], jacobian.shape[1])
            else:
                directions = jacobian.T.reshape(-1, *outputs.shape)
                (curved,) = torch.autograd.grad(
                    slope, outputs, directions, retain_graph=True, is_grads_batched=True
                )
                matrix = curved.flatten(1).to(jacobian.dtype) @ jacobian
        matrix = (matrix + matrix.T) / 2
        self._measured.append(Dense(matrix if matrix.dtype == torch.float64 else matrix.float()))

    def collect(self) -> dict[Block, Curvature]:
        """The mean of the measurements since the last call, if there were any; it may be indefinite."""
        measured, self._measured = self._measured, []
        if not measured:
            return {}
        return {self._block: weighted_sum([1 / len(measured)] * len(measured), measured)}

    def detach(self) -> None:
        """Nothing to take off."""

    def _rows(self, functions: Tensor) -> Tensor:
        """∂functions/∂θ, [functions, parameters] in the order of the block's matrix Δ."""
        if not functions.requires_grad:
            return functions.new_zeros(len(functions), sum(p.numel() for p in self._parameters))
        unit = torch.eye(len(functions), dtype=functions.dtype, device=functions.device)
        return torch.cat([self._chunk(functions, some) for some in torch.split(unit, _ROWS_AT_A_TIME)])

    def _chunk(self, functions: Tensor, directions: Tensor) -> Tensor:
        parts = derivatives(functions, self._parameters, directions, retain_graph=True, is_grads_batched=True)
        wide = [
            functions.new_zeros(len(directions), *p.shape) if part is None else part
            for part, p in zip(parts, self._parameters, strict=True)
        ]
        return torch.vmap(lambda *row: to_matrix(row).flatten())(*wide)

    def _flat(self, parts: Sequence[Tensor | None]) -> Tensor:
        """A gradient as vec(Δ)."""
        whole = [torch.zeros_like(p) if g is None else g for p, g in zip(self._parameters, parts, strict=True)]
        return to_matrix(whole).flatten()
