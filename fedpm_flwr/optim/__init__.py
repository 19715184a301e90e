"""Second-order optimizers that also say what their preconditioner was."""

from .correction import correct_gradients
from .foof import FOOF
from .kfac import KFAC
from .ltda import LTDA
from .newton import Newton
from .second_order import SecondOrder
from .sophia import Sophia

__all__ = ["FOOF", "KFAC", "LTDA", "Newton", "SecondOrder", "Sophia", "correct_gradients"]
