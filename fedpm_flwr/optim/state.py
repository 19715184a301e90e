"""Curvature in an optimizer's state: as plain tensors, so that ``torch.load`` reads it without trust."""

from typing import Any

import torch

from ..curvature import KINDS, KroneckerBasis, Operator

_KIND = "kind"


def to_state(operator: Operator) -> dict[str, Any]:
    """Its kind and its parts by name."""
    return {_KIND: operator.kind, **operator.parts()}


def from_state(state: dict[str, Any]) -> Operator:
    """The operator again."""
    parts = {name: part for name, part in state.items() if name != _KIND}
    kind: type[Operator] = KroneckerBasis if state[_KIND] == KroneckerBasis.kind else KINDS[state[_KIND]]
    return kind(**parts)


def restore(own: dict[str, Any], saved: dict[str, Any], device: torch.device) -> None:
    """Put back what torch has cast to the parameter's dtype when it loaded it: curvature keeps its own."""
    for key, value in saved.items():
        if isinstance(value, dict) and _KIND in value:
            own[key] = {
                name: part.to(device) if isinstance(part, torch.Tensor) else part for name, part in value.items()
            }
