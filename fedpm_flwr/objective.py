"""A client's whole local objective: value, gradient, Hessian, on all of its examples."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .curvature import Dense, from_matrix, matrix_shape, to_matrix
from .estimators import ExactHessian
from .training import Batches, Loss, on_device


class Objective:
    """f(θ) = (1/n) Σ loss(model(x), y) + ω/2 ‖θ‖², of the model's trainable parameters as one vector [d].

    In evaluation mode, so that nothing is drawn at random and no running statistics change. θ is the
    parameters' joint matrix row by row (``curvature.to_matrix``), as in an exact Hessian on the wire.

    Args:
        model: holds θ, and is left as it was but for ``move_to``.
        batches: all examples, in an order of no importance.
        loss: the mean over a batch.
        weight_decay: ω.
        device: where the model is.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        loss: Loss,
        weight_decay: float = 0.0,
        device: torch.device | str = "cpu",
    ) -> None:
        self._model, self._batches, self._loss, self._device = model, batches, loss, device
        self._named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._parameters = list(self._named.values())
        self._decay = weight_decay

    @property
    def theta(self) -> Tensor:
        """θ, a copy."""
        return to_matrix([p.detach() for p in self._parameters]).flatten().clone()

    @torch.no_grad()
    def move_to(self, theta: Tensor) -> None:
        """Set the model's parameters."""
        for name, part in self.by_name(theta).items():
            self._named[name].copy_(part)

    def by_name(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector as tensors of the parameters' shapes, by their names."""
        shapes = [p.shape for p in self._parameters]
        parts = from_matrix(vector.reshape(matrix_shape(shapes)), shapes)
        return dict(zip(self._named, parts, strict=True))

    def to_vector(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Undo ``by_name``; a name that is missing counts as zeros."""
        whole = [tensors[name] if name in tensors else torch.zeros_like(p) for name, p in self._named.items()]
        return to_matrix(whole).flatten()

    @torch.no_grad()
    def value(self) -> float:
        """f(θ)."""
        return float(self._mean(lambda loss, _: loss) + self._decay / 2 * self.theta.square().sum())

    def gradient(self) -> Tensor:
        """∇f(θ), [d]."""

        def of_batch(loss: Tensor, outputs: Tensor) -> Tensor:
            slopes = torch.autograd.grad(loss, self._parameters, allow_unused=True, materialize_grads=True)
            return to_matrix(slopes).flatten()

        return self._mean(of_batch) + self._decay * self.theta

    def hessian(self, matrix: str = "hessian", max_side: int = 8192) -> Tensor:
        """∇²f(θ), [d, d]; by ``matrix="ggn"`` the Gauss-Newton matrix of the loss, plus ωI.

        Raises:
            ValueError: there are more than ``max_side`` parameters.
        """
        estimator = ExactHessian(self._model, matrix, self._parameters, max_side)

        def of_batch(loss: Tensor, outputs: Tensor) -> Tensor:
            estimator.measure(loss, outputs)
            (measured,) = estimator.collect().values()
            assert isinstance(measured, Dense)
            return measured.matrix

        mean = self._mean(of_batch)
        return mean + self._decay * torch.eye(len(mean), dtype=mean.dtype, device=mean.device)

    def _mean(self, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The mean over all examples of what ``function(loss, outputs)`` makes of each batch."""
        total, examples = torch.zeros((), device=self._device), 0
        with _evaluating(self._model):
            for batch in self._batches:
                inputs, targets = on_device(self._model, *batch, self._device)
                outputs = self._model(inputs)
                part = function(self._loss(outputs, targets), outputs) * len(inputs)
                total = total + part
                examples += len(inputs)
        return total / max(examples, 1)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
