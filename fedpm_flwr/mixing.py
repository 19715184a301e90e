"""Preconditioned mixing (FedPM, arXiv 2511.09100, Eq. 8 in delta form):

    θ⁺ = θ + η_s · (Σ wᵢ Pᵢ)⁻¹ Σ wᵢ Pᵢ (θᵢ − θ)

the minimiser over ϑ of Σ wᵢ ‖ϑ − θᵢ‖²_Pᵢ when η_s = 1: each client is trusted most in the
directions in which its own loss is most curved. ``mix`` is the equation for one layer with all
clients at hand; ``LayerMixer`` is the same as two running sums; ``ModelMixer`` is a whole model.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .curvature import (
    Block,
    Curvature,
    CurvatureError,
    Dense,
    Kronecker,
    LayerCurvature,
    Spill,
    Sum,
    from_matrix,
    mean_factors,
    plus,
    to_matrix,
    weighted_sum,
)


def mix(
    theta: Tensor,
    clients: Sequence[Tensor],
    curvatures: Sequence[Curvature],
    weights: Sequence[float],
    server_learning_rate: float = 1.0,
) -> Tensor:
    """Mix one layer: θ and each θᵢ are [rows, columns], Pᵢ is damped; only ratios of wᵢ matter.

    Raises:
        CurvatureError: Σ wᵢ Pᵢ is not positive definite.
    """
    total = weighted_sum(weights, curvatures)  # Σ wᵢ Pᵢ
    moved = sum(  # Σ wᵢ Pᵢ (θᵢ − θ)
        (w * P.matmul(client - theta) for w, P, client in zip(weights, curvatures, clients, strict=True)),
        torch.zeros_like(theta),
    )
    return theta + server_learning_rate * total.solve(moved)


class LayerMixer:
    """``mix`` as two running sums, so that memory does not grow with the number of clients.

    Two-sided Kronecker products have no such sum: each client's factors are kept, by ``spill`` on
    disk when they are many. ``factored`` adds up the factors instead, Σ wᵢ Pᵢ ≈ Ḡ ⊗ Ā + λ̄I. That is
    an approximation: exact where all Pᵢ are equal, but else the mixed model is no longer the
    minimiser, and not even the clients' common model where they agree.
    """

    def __init__(self, spill: Spill | None = None, factored: bool = False) -> None:
        self.weight = 0.0
        self._spill = spill or Spill()
        self._factored = factored
        self._total: Curvature | None = None  # Σ wᵢ Pᵢ
        self._moved: Tensor | None = None  # Σ wᵢ Pᵢ (θᵢ − θ)

    def add(self, delta: Tensor, curvature: Curvature, weight: float) -> None:
        """Fold in θᵢ − θ [rows, columns], the damped Pᵢ and wᵢ > 0."""
        scaled = curvature.scaled(weight)
        moved = scaled.matmul(delta)  # a new tensor, which the sum may be kept in
        if isinstance(scaled, Kronecker) and not self._factored:
            scaled = scaled.map(self._spill.keep)
        self._total = scaled if self._total is None else self._plus(self._total, scaled)
        self._moved = moved if self._moved is None else self._moved.add_(moved)
        self.weight += weight

    def _plus(self, total: Curvature, added: Curvature) -> Curvature:
        if self._factored and isinstance(added, Kronecker):
            terms = total.terms if isinstance(total, Sum) else (total,)
            for place, term in enumerate(terms):
                if isinstance(term, Kronecker) and term.left.shape == added.left.shape:
                    mean = mean_factors(term, added)
                    return Sum((*terms[:place], mean, *terms[place + 1 :])) if len(terms) > 1 else mean
        if self._factored and isinstance(added, Dense):  # which holds the means from then on
            total = _clamped(total)
        return plus(total, added)

    def step(self) -> Tensor:
        """(Σ wᵢ Pᵢ)⁻¹ Σ wᵢ Pᵢ (θᵢ − θ), [rows, columns].

        Raises:
            CurvatureError: no client was added, or Σ wᵢ Pᵢ is not positive definite.
        """
        if self._total is None or self._moved is None:
            raise CurvatureError("there is no client to mix")
        if self._factored and isinstance(self._total, Kronecker):
            return self._total.inverse(clamped=True).matmul(self._moved)
        total = _clamped(self._total) if self._factored else self._total
        return total.solve(self._moved)


class ModelMixer:
    """Mixes whole models, given as mappings from parameter names to tensors.

    A parameter that no client gives curvature for is averaged. Where only some clients do, they
    are mixed among themselves, and the result is averaged with the others by weight: so each of
    the others counts as if it had their mean curvature, and no unit has to be made up for it. Where
    clients group parameters into different layers, each grouping is mixed for itself likewise.

    Sums are kept in ``dtype``; the result has θ's names, shapes, dtypes and devices. Integers are
    rounded. Nothing that is passed in is changed.

    Args:
        theta: θ, by parameter name.
        dtype: of the sums.
        memory: bytes of Kronecker factors (``LayerMixer``) to keep in memory; the others go to disk.
        factored: whether sums of Kronecker products are approximated (``LayerMixer``).
        device: where sums are kept and computed with; by default where θ is.
    """

    def __init__(
        self,
        theta: Mapping[str, Tensor],
        dtype: torch.dtype = torch.float64,
        memory: int = 4 << 30,
        factored: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self._theta = theta
        self._masks = {key for key, value in theta.items() if not torch.isfinite(value).all()}
        self._dtype, self._device = dtype, device
        self._spill = Spill(memory)
        self._factored = factored
        self._weight = 0.0
        self._mixers: dict[Block, LayerMixer] = {}
        self._plain: dict[str, Tensor] = {}  # Σ wᵢ (θᵢ − θ) over clients without curvature there

    def add(self, client: Mapping[str, Tensor], layers: Iterable[LayerCurvature], weight: float) -> None:
        """Fold in one client: its model θᵢ, the curvature it sent (disjoint layers), and wᵢ > 0."""
        deltas = {key: self._delta(key, client[key]) for key in self._theta}
        for layer in layers:
            delta = to_matrix([deltas.pop(key) for key in layer.block.parameters])
            for key, _ in layer.block.copies:
                deltas.pop(key)
            curvature = layer.curvature.to(self._dtype, delta.device).damped(layer.damping)
            mixer = self._mixers.setdefault(layer.block, LayerMixer(self._spill, self._factored))
            mixer.add(delta, curvature, weight)
        for key, delta in deltas.items():
            self._plain[key] = self._plain[key].add_(delta, alpha=weight) if key in self._plain else weight * delta
        self._weight += weight

    def result(self, server_learning_rate: float = 1.0) -> dict[str, Tensor]:
        """θ⁺ = θ + η_s · step; at least one client must have been added.

        Raises:
            CurvatureError: no client was added, Σ wᵢ Pᵢ of a layer is not positive definite, or a
                result is not finite; names the layer or parameter.
        """
        if not self._weight:
            raise CurvatureError("there is no client to mix")
        steps = {key: total / self._weight for key, total in self._plain.items()}
        for block, mixer in self._mixers.items():
            share = mixer.weight / self._weight
            for key, step in self._layer_steps(block, mixer).items():
                steps[key] = steps[key] + share * step if key in steps else share * step
        mixed = {key: _moved(old, server_learning_rate * steps[key]) for key, old in self._theta.items()}
        for key, value in mixed.items():
            if not (torch.isfinite(value) | (value == self._theta[key])).all():
                raise CurvatureError(f"the mixed {key!r} is not finite")
        return mixed

    def _delta(self, key: str, new: Tensor) -> Tensor:
        """θᵢ − θ, and 0 where they are equal: infinities, as in masks, have no difference."""
        old = self._theta[key]
        delta = new.to(self._device, self._dtype) - old.to(self._device, self._dtype)
        return delta.masked_fill((new == old).to(delta.device), 0.0) if key in self._masks else delta

    def _layer_steps(self, block: Block, mixer: LayerMixer) -> dict[str, Tensor]:
        try:
            steps = from_matrix(mixer.step(), [self._theta[key].shape for key in block.parameters])
        except CurvatureError as error:
            raise CurvatureError(f"layer {block.name!r}: {error}") from error
        own = dict(zip(block.parameters, steps, strict=True))
        return own | {key: own[original] for key, original in block.copies}


def _clamped(total: Curvature) -> Curvature:
    """Means of factors, each of which may be a little negative somewhere, need not be definite: made so."""
    if isinstance(total, Sum):
        return Sum(tuple(_clamped(term) for term in total.terms))
    return total.clamped() if isinstance(total, Kronecker) else total


def _moved(old: Tensor, step: Tensor) -> Tensor:
    new = old.to(step.dtype) + step.to(old.device)
    return (new if old.is_floating_point() else new.round()).to(old.dtype)
