"""The losses whose curvature is known from the model's outputs alone: no labels are needed.

Outputs z are [examples, classes] or [examples, classes, …]: every further position is an example of
its own, as for ``torch.nn.functional.cross_entropy``. The loss is the mean over these m examples.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..curvature.linalg import at_least_float32

LOSSES = ("cross-entropy", "mse")


def check_loss(loss: str) -> str:
    """Raises ValueError, naming the allowed ones, unless the loss is one of ``LOSSES``."""
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}; allowed: {', '.join(LOSSES)}")
    return loss


def as_logits(outputs: object) -> Tensor:
    """The model's outputs as [m, classes], float32 at least; ``outputs.logits`` where they are no tensor.

    Raises:
        TypeError: there is no such tensor.
    """
    wrapped = not isinstance(outputs, Tensor)
    outputs = getattr(outputs, "logits", None) if wrapped else outputs
    # Language models of the Transformers library return logits [batch, positions, classes]: not ours.
    if not isinstance(outputs, Tensor) or outputs.ndim < 2 or (wrapped and outputs.ndim > 2):
        raise TypeError("curvature by outputs needs a model that returns one tensor [examples, classes, ...]")
    rows: Tensor = outputs.movedim(1, -1)
    return at_least_float32(rows.flatten(0, -2))


def sampled_gradient(logits: Tensor, loss: str, generator: torch.Generator) -> Tensor:
    """∂ℓ/∂z of each example, [m, classes], for a target drawn from the model's own distribution.

    The mean of its outer products is the Hessian of ℓ by z: p − ŷ with ŷ ~ p for cross-entropy; for
    ``torch.nn.functional.mse_loss``, ℓ = ‖z − y‖² / classes, √(2 / classes) ε with ε ~ N(0, I).
    """
    if loss == "mse":
        noise = torch.randn(logits.shape, generator=generator, dtype=logits.dtype, device=logits.device)
        return noise.mul_((2 / logits.shape[1]) ** 0.5)
    probabilities = logits.detach().softmax(dim=1)
    # The first arrival among exponential clocks of rates p is drawn by p; unlike torch.multinomial this
    # neither waits for the device nor raises where outputs are not finite.
    drawn = (probabilities / torch.empty_like(probabilities).exponential_(generator=generator)).argmax(1, True)
    return probabilities - torch.zeros_like(probabilities).scatter_(1, drawn, 1.0)


def exact_gradients(logits: Tensor, loss: str) -> Iterator[Tensor]:
    """Vectors [m, classes], one for each class, whose outer products add up to the Hessian of ℓ by z."""
    classes = logits.shape[1]
    if loss == "mse":
        for c in range(classes):
            column = torch.zeros_like(logits)
            column[:, c] = (2 / classes) ** 0.5
            yield column
        return
    root = logits.detach().softmax(dim=1).sqrt()
    for c in range(classes):  # diag(p) − p pᵀ = S Sᵀ with S = diag(√p) − p √pᵀ
        column = -root.square() * root[:, c : c + 1]
        column[:, c] += root[:, c]
        yield column
