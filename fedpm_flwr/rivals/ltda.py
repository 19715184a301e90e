"""LTDA (Sen, Mohan, Qin, PReMI 2023, LNCS 14301): local steps by a diagonal of linear cost, averaged.

    θᵢ ← θᵢ − η gᵢ / (|v²/v₀| + λ) (K times),      θ⁺ = Σ wᵢ θᵢ,  wᵢ = nᵢ / Σ nⱼ

with v [d] the first row of the Hessian of the batch's loss, v₀ its first entry. ``optim.LTDA`` takes the steps,
``estimators.FirstRow`` says what the source gives of v and what is inferred. Inferred besides: the
average over a round's batches (``ema``, ``refresh-interval``), afresh in each round.
"""

from .localnewton import with_optimizer

METHOD = with_optimizer("ltda")
