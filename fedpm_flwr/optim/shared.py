"""Arguments that all optimizers hand on to ``SecondOrder``, which explains them: for editors and type checkers."""

from typing import TypedDict


class Shared(TypedDict, total=False):
    """Of all of them."""

    plain_lr: float | None
    """η of parameters without a P."""
    relative_damping: bool
    """Whether λ is in units of P's mean eigenvalue."""
    momentum: float
    """μ."""
    clip: float
    """Largest Euclidean norm of the update of all parameters together; 0: any."""
    codec: str | None
    """Name of a wire codec: P is what it makes of it."""


class SharedWithDecay(Shared, total=False):
    """Of those that leave weight decay to the caller."""

    weight_decay: float
    """ω."""
    decoupled_weight_decay: bool
    """Whether ω shrinks the parameters directly, or is part of the gradient."""
