"""Whether clients measure alike: curvature of other units than the others' counts more in the mix, or less."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from .curvature import Kronecker, LayerCurvature

_MUCH = 10.0
"""λ so many times another's is no accident of the data."""


@dataclass
class Agreement:
    """What the replies of a round have in common, layer by layer: one factor or two, and λ."""

    _two_sided: dict[str, set[bool]] = field(default_factory=dict)
    _dampings: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, layers: Iterable[LayerCurvature]) -> None:
        """One reply's."""
        for layer in layers:
            name, damping = layer.block.name or layer.block.parameters[0], layer.damping
            self._two_sided.setdefault(name, set()).add(isinstance(layer.curvature, Kronecker))
            low, high = self._dampings.get(name, (damping, damping))
            self._dampings[name] = min(low, damping), max(high, damping)

    def difference(self) -> str:
        """Of the first layer that has one, in words; empty: there is none."""
        for name, (low, high) in self._dampings.items():
            if len(self._two_sided[name]) > 1:
                return f"{name!r} has K-FAC's from some and not from others"
            if high > _MUCH * low:
                return f"{name!r} is damped by {low:g} to {high:g}"
        return ""
