"""Diagonal curvature: Gauss-Newton-Bartlett, Hutchinson, and the Hessian's first row."""

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from ..curvature import Block, Curvature, Diagonal, to_matrix, weighted_sum
from .blocks import parameter_blocks
from .hooks import Handles, Hook, unwrapped
from .likelihood import as_logits, check_loss, sampled_gradient
from .positive import absolute


class _Diagonals:
    """A diagonal for each parameter: the mean of what was measured since the last ``collect``."""

    def __init__(self, model: nn.Module, parameters: Iterable[nn.Parameter] | None) -> None:
        self._parameters = parameter_blocks(model, parameters)
        self._measured: dict[Block, list[Curvature]] = {}
        self.recording: Collection[Block] = self.blocks

    @property
    def blocks(self) -> list[Block]:
        """A block for each trainable parameter."""
        return list(self._parameters)

    def collect(self) -> dict[Block, Curvature]:
        """P ≥ 0 of each parameter, the mean of the measurements since the last call, if there were any."""
        found = {
            block: absolute(weighted_sum([1 / len(parts)] * len(parts), parts))
            for block, parts in self._measured.items()
        }
        self._measured = {}
        return found

    def detach(self) -> None:
        """Nothing to take off."""

    def _due(self) -> dict[Block, nn.Parameter]:
        return {block: p for block, p in self._parameters.items() if block in self.recording}

    def _add(self, diagonals: Mapping[Block, Tensor]) -> None:
        for block, values in diagonals.items():
            wide = values if values.dtype == torch.float64 else values.float()
            self._measured.setdefault(block, []).append(Diagonal(to_matrix([wide.detach()])))


class GaussNewtonBartlett(_Diagonals):
    """ĥ = m · ĝ ⊙ ĝ with ĝ the gradient of the mean loss of m examples whose targets the model itself draws.

    Its expectation is the diagonal of the Gauss-Newton matrix (Liu et al. 2023, Sophia, Algorithm 2).
    One more backward pass for each measurement, right after the forward pass of ``model``.

    Args:
        model: a hook is put on it until ``detach`` is called.
        loss: ``cross-entropy`` or ``mse``, the mean over the batch.
        parameters: those to measure; by default all. Frozen ones never are.
        seed: of the drawn targets.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: str = "cross-entropy",
        parameters: Iterable[nn.Parameter] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(model, parameters)
        self._loss, self._seed = check_loss(loss), seed
        self._generator: torch.Generator | None = None
        self._handles = Handles(self)
        self._handles.add(unwrapped(model).register_forward_hook(Hook(self, "_after_forward")))

    def detach(self) -> None:
        """Take the hook off the model, as also happens when the estimator is no longer used."""
        self._handles.remove()

    def _after_forward(self, model: nn.Module, args: object, outputs: object) -> None:
        due = self._due()
        logits = as_logits(outputs) if due else None
        if logits is None or not len(logits):
            return
        if self._generator is None or self._generator.device != logits.device:
            self._generator = torch.Generator(logits.device).manual_seed(self._seed)
        direction = sampled_gradient(logits.detach(), self._loss, self._generator) / len(logits)
        with torch.autocast(logits.device.type, enabled=False):
            gradients = torch.autograd.grad(
                logits, list(due.values()), direction, retain_graph=True, allow_unused=True
            )
        self._add(
            {
                block: len(logits) * gradient.to(logits.dtype).square()
                for block, gradient in zip(due, gradients, strict=True)
                if gradient is not None
            }
        )


class Hutchinson(_Diagonals):
    """h = v ⊙ (Hv) with v of random signs: its expectation is the diagonal of the Hessian H.

    ``measure(loss)`` before ``loss.backward()``: one Hessian-vector product for each sample. Negative
    entries are made positive as ``positive`` says.

    Args:
        model: whose parameters are measured.
        samples: v drawn for each measurement.
        parameters: those to measure; by default all. Frozen ones never are.
        seed: of v.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: int = 1,
        parameters: Iterable[nn.Parameter] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(model, parameters)
        self._samples, self._seed = samples, seed
        self._generator: torch.Generator | None = None

    def measure(self, loss: Tensor, outputs: object = None) -> None:
        """Measure at the current parameters."""
        due = self._due()
        if not due:
            return
        if self._generator is None or self._generator.device != loss.device:
            self._generator = torch.Generator(loss.device).manual_seed(self._seed)
        gradients = _gradients(loss, list(due.values()))
        for _ in range(self._samples):
            signs = [_signs(p, self._generator) for p in due.values()]
            products = _products(gradients, list(due.values()), signs)
            self._add({block: v * hv for block, v, hv in zip(due, signs, products, strict=True)})


class FirstRow(_Diagonals):
    """diag(H) ≈ v²/v₀ with v the first row of the Hessian: LTDA (Sen et al., PReMI 2023).

    If H has rank one, H = v vᵀ/v₀, and the diagonal is exact. ``measure(loss)`` before
    ``loss.backward()``: one Hessian-vector product, with the first unit vector.

    The source names the first row and the approximation. Inferred here: the row is that of the
    first entry of the first trainable parameter, taken over the whole model; v₀ < 0 is made positive
    as ``positive`` says; where v₀ is 0, as for a weight of an input that is always 0, so is the diagonal.
    """

    def measure(self, loss: Tensor, outputs: object = None) -> None:
        """Measure at the current parameters."""
        due = self._due()
        if not due:
            return
        parameters = list(due.values())
        unit = [torch.zeros_like(p) for p in parameters]
        unit[0].view(-1)[0] = 1.0
        row = _products(_gradients(loss, parameters), parameters, unit)
        corner = row[0].flatten()[0]
        self._add(
            {
                block: torch.where(corner != 0, v.square() / torch.where(corner != 0, corner, 1.0), 0.0)
                for block, v in zip(due, row, strict=True)
            }
        )


def _gradients(loss: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    found = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def _products(gradients: list[Tensor], parameters: list[nn.Parameter], vectors: list[Tensor]) -> list[Tensor]:
    """Hv, from gradients that have a graph."""
    total = sum((g * v).sum() for g, v in zip(gradients, vectors, strict=True))
    assert isinstance(total, Tensor)
    if not total.requires_grad:  # a loss that is linear in all parameters
        return [torch.zeros_like(p) for p in parameters]
    found = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def _signs(p: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, p.shape, generator=generator, device=p.device).to(p.dtype) * 2 - 1
