"""Diagonal curvature: Gauss-Newton-Bartlett, Hutchinson, and the Hessian's first row."""

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from ..curvature import Block, Curvature, Diagonal, to_matrix, weighted_sum
from .blocks import derivatives, parameter_blocks
from .hooks import Handles, Hook, unwrapped
from .likelihood import as_logits, check_loss, sampled_gradient


class _Diagonals:
    """A diagonal for each parameter: the mean of what was measured since the last ``collect``."""

    signed = False
    """Whether entries may be negative: then their average is what ``positive`` is applied to."""

    def __init__(self, model: nn.Module, parameters: Iterable[nn.Parameter] | None) -> None:
        self._parameters = parameter_blocks(model, parameters)
        self._measured: dict[Block, list[Curvature]] = {}
        self.recording: Collection[Block] = self.blocks

    @property
    def blocks(self) -> list[Block]:
        """A block for each trainable parameter."""
        return list(self._parameters)

    def collect(self) -> dict[Block, Curvature]:
        """The diagonal of each parameter, the mean of the measurements since the last call, if there were any."""
        found = {
            block: weighted_sum([1 / len(parts)] * len(parts), parts) for block, parts in self._measured.items()
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
        class_dim: the dimension of the outputs that holds the classes, if there are more than two: 1 or -1.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: str = "cross-entropy",
        parameters: Iterable[nn.Parameter] | None = None,
        seed: int = 0,
        class_dim: int | None = None,
    ) -> None:
        super().__init__(model, parameters)
        self._loss, self._seed, self._class_dim = check_loss(loss), seed, class_dim
        self._generator: torch.Generator | None = None
        self._handles = Handles(self)
        self._handles.add(unwrapped(model).register_forward_hook(Hook(self, "_after_forward")))

    def detach(self) -> None:
        """Take the hook off the model, as also happens when the estimator is no longer used."""
        self._handles.remove()

    def _after_forward(self, model: nn.Module, args: object, outputs: object) -> None:
        due = self._due()
        logits = as_logits(outputs, self._loss, self._class_dim) if due else None
        if logits is None or not logits.numel() or not logits.requires_grad:
            return
        examples = logits[..., 0].numel()
        if self._generator is None or self._generator.device != logits.device:
            self._generator = torch.Generator(logits.device).manual_seed(self._seed)
        direction = sampled_gradient(logits.detach(), self._loss, self._generator) / examples
        with torch.autocast(logits.device.type, enabled=False):
            gradients = derivatives(logits, list(due.values()), direction, retain_graph=True)
        self._add(
            {
                block: examples * gradient.to(logits.dtype).square()
                for block, gradient in zip(due, gradients, strict=True)
                if gradient is not None
            }
        )


class Hutchinson(_Diagonals):
    """h = v ⊙ (Hv) with v of random signs: its expectation is the diagonal of the Hessian H.

    ``measure(loss)`` before ``loss.backward()``: one Hessian-vector product for each sample. Entries
    may be negative.

    Args:
        model: whose parameters are measured.
        samples: v drawn for each measurement.
        parameters: those to measure; by default all. Frozen ones never are.
        seed: of v.
    """

    signed = True

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
    ``loss.backward()``: one Hessian-vector product, with a unit vector. Entries are negative where v₀ is.

    The source names the first row and the approximation. Inferred here: the row is taken over the
    whole model, of the first entry, in the order of the parameters, whose gradient is not 0 (an
    input that is always 0, as the first pixel of a digit, has neither gradient nor curvature, and
    its row would say nothing of the others). Where v₀ is 0 all the same, so is the diagonal.
    """

    signed = True

    def measure(self, loss: Tensor, outputs: object = None) -> None:
        """Measure at the current parameters."""
        due = self._due()
        if not due:
            return
        parameters = list(due.values())
        gradients = _gradients(loss, parameters)
        place = torch.cat([g.detach().flatten() != 0 for g in gradients]).to(torch.uint8).argmax()
        unit = (torch.arange(sum(p.numel() for p in parameters), device=place.device) == place).to(loss.dtype)
        units = torch.split(unit, [p.numel() for p in parameters])
        vectors = [part.reshape(p.shape).to(p.dtype) for part, p in zip(units, parameters, strict=True)]
        row = _products(gradients, parameters, vectors)
        corner = torch.stack([(v * u).sum() for v, u in zip(row, vectors, strict=True)]).sum()
        self._add(
            {
                block: torch.where(corner != 0, v.square() / torch.where(corner != 0, corner, 1.0), 0.0)
                for block, v in zip(due, row, strict=True)
            }
        )


def _gradients(loss: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    found = derivatives(loss, parameters, create_graph=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def _products(gradients: list[Tensor], parameters: list[nn.Parameter], vectors: list[Tensor]) -> list[Tensor]:
    """Hv, from gradients that have a graph."""
    total = sum((g * v).sum() for g, v in zip(gradients, vectors, strict=True))
    assert isinstance(total, Tensor)
    if not total.requires_grad:  # a loss that is linear in all parameters
        return [torch.zeros_like(p) for p in parameters]
    found = derivatives(total, parameters, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def _signs(p: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, p.shape, generator=generator, device=p.device).to(p.dtype) * 2 - 1
