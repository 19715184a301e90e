"""Fed-Sophia (Elbakary et al. 2024, arXiv 2406.06655): local steps of Sophia, averaged.

    m ← β₁ m + (1 − β₁) gᵢ,      h ← β₂ h + (1 − β₂) ĥᵢ (every ``refresh-interval`` steps)
    θᵢ ← (1 − ηω) θᵢ − η clip(m / max(γ h, ε), 1) (K times),      θ⁺ = Σ wᵢ θᵢ,  wᵢ = nᵢ / Σ nⱼ

m, h [d], and ĥᵢ the Gauss-Newton-Bartlett diagonal of the batch; all by entries. ``optim.Sophia`` takes the
steps. Where the source clips m / max(h, ε) at ρ, these are its steps with γ = ρ and η = ρ times its η:
γ, the setting ``sophia-gamma``, lifts the clip as it grows.

Inferred: m and h start at 0 in each round (the source does not say that clients keep them); clients are
weighed by their examples, where the source averages uniformly.
"""

from .localnewton import with_optimizer

METHOD = with_optimizer("sophia")
