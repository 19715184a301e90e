"""The losses whose curvature is known from the model's outputs alone: no labels are needed.

Outputs z are [examples, classes], or have further dimensions, in which every position has a loss of its
own. The loss is the mean over all m of these. Here they are seen as [examples, positions, classes], with
one position where there are no more. Which dimension holds the classes cannot be seen: torch's
``cross_entropy`` takes the second, many language models return them last. So it has to be said.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..curvature.linalg import at_least_float32

LOSSES = ("cross-entropy", "mse")
"""As torch's functions of these names, the mean over the batch."""


def check_loss(loss: str) -> str:
    """Raises ValueError, naming the allowed ones, unless the loss is one of ``LOSSES``."""
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}; allowed: {', '.join(LOSSES)}")
    return loss


def as_logits(outputs: object, loss: str | None, class_dim: int | None = None) -> Tensor:
    """The outputs as [examples, positions, classes], float32 at least; ``outputs.logits`` if they are no tensor.

    Args:
        outputs: what a model has returned.
        loss: the one whose curvature is drawn from them; None where they are only counted.
        class_dim: the dimension of the classes. None: the second of two; of more it is needed but for
            ``mse``, where each entry counts alike.

    Raises:
        TypeError: there is no such tensor.
        ValueError: the loss is ``cross-entropy``, and of one class, whose probability is always 1; or
            ``class_dim`` is missing, or does not fit.
    """
    wrapped = not isinstance(outputs, Tensor)
    outputs = getattr(outputs, "logits", None) if wrapped else outputs
    # Language models of the Transformers library return logits [batch, positions, classes]: not ours.
    if not isinstance(outputs, Tensor) or outputs.ndim < 2 or (wrapped and outputs.ndim > 2):
        raise TypeError("curvature by outputs needs a model that returns one tensor [examples, classes, ...]")
    if class_dim is None and outputs.ndim > 2 and loss != "mse":
        raise ValueError(
            f"outputs of shape {tuple(outputs.shape)}: which dimension holds the classes? class_dim=1 where they "
            "are second, as torch's cross_entropy takes them, class_dim=-1 where they are last, as in "
            "language models"
        )
    class_dim = 1 if class_dim is None else class_dim
    if class_dim == 0 or not -outputs.ndim < class_dim < outputs.ndim:
        raise ValueError(
            f"class_dim={class_dim} of outputs of shape {tuple(outputs.shape)}: not one of 1, -1, ..."
        )
    rows: Tensor = outputs.movedim(class_dim, -1)
    if loss == "cross-entropy" and rows.shape[-1] == 1:
        raise ValueError(
            "cross-entropy of one output has no curvature, which would leave damping alone: two outputs for two "
            'classes, loss="mse" if a squared error is trained, or else FOOF, which does not see the loss'
        )
    return at_least_float32(rows[:, None] if rows.ndim == 2 else rows.flatten(1, -2))


def sampled_gradient(logits: Tensor, loss: str, generator: torch.Generator) -> Tensor:
    """∂ℓ/∂z, as ``logits`` [examples, positions, classes], for targets drawn from the model's own distribution.

    The mean of its outer products is the Hessian of ℓ by z: p − ŷ with ŷ ~ p for cross-entropy; for
    ``torch.nn.functional.mse_loss``, ℓ = ‖z − y‖² / classes, √(2 / classes) ε with ε ~ N(0, I).
    """
    if loss == "mse":
        noise = torch.randn(logits.shape, generator=generator, dtype=logits.dtype, device=logits.device)
        return noise.mul_((2 / logits.shape[-1]) ** 0.5)
    probabilities = logits.detach().softmax(dim=-1)
    # As torch.multinomial draws, but that raises where outputs are not finite, and on a GPU ends the process.
    drawn = (probabilities / torch.empty_like(probabilities).exponential_(generator=generator)).argmax(-1, True)
    return probabilities - torch.zeros_like(probabilities).scatter_(-1, drawn, 1.0)


def exact_gradients(logits: Tensor, loss: str) -> Iterator[Tensor]:
    """Vectors as ``logits`` is, one for each position and class, whose outer products add up to the Hessian by z.

    Each is of one position only: a layer's output that several positions depend on gets the sum of
    their gradients, and the products of two positions' are no part of the Hessian.
    """
    _, positions, classes = logits.shape
    root = logits.detach().softmax(dim=-1).sqrt()
    for t in range(positions):
        for c in range(classes):
            column = torch.zeros_like(root)
            if loss == "mse":
                column[:, t, c] = (2 / classes) ** 0.5
            else:  # diag(p) − p pᵀ = S Sᵀ with S = diag(√p) − p √pᵀ
                column[:, t] = -root[:, t].square() * root[:, t, c, None]
                column[:, t, c] += root[:, t, c]
            yield column
