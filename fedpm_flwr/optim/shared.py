"""Arguments that all optimizers hand on to ``SecondOrder``, which explains them: for editors and type checkers."""

from typing import TypedDict


class Shared(TypedDict, total=False):
    """Of all of them."""

    plain_lr: float | None
    relative_damping: bool
    momentum: float
    clip: float
    codec: str | None


class SharedWithDecay(Shared, total=False):
    """Of those that leave weight decay to the caller."""

    weight_decay: float
    decoupled_weight_decay: bool
