"""Second-order optimizers that also say what their preconditioner was."""

from .foof import FOOF

__all__ = ["FOOF"]
