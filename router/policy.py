"""From the scores of all experts to the weights of the few that are blended.

    proportional   weight ∝ score among the top m, Σ = 1       (QLoRA-MoE report §3.2, prose)
    softmax        weight ∝ exp(score / temperature) among the top m, Σ = 1
    hydra_minmax   score mapped by min-max to [0, 1], Σ ≠ 1     (hydra-moe `mult_weights_by_alpha`)

Scores are plain numbers, not arrays: a pool has dozens of experts, and for so few a NumPy call costs more
than its arithmetic. All of it is float64. Equal scores are cut in expert order, so a decision never depends
on chance, and no policy gives weight to more than m experts.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

from .errors import RouterError

Policy = Literal["proportional", "softmax", "hydra_minmax"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


def ranking(scores: Sequence[float]) -> list[int]:
    """Positions of [k] scores, best first, ties in position order. Raises RouterError if not finite."""
    if not scores or not all(map(math.isfinite, scores)):
        raise RouterError("scores must be finite, one for each expert")
    return sorted(range(len(scores)), key=scores.__getitem__, reverse=True)


def blend_weights(ordered: Sequence[float], m: int, policy: Policy, temperature: float) -> list[float]:
    """All k scores, best first -> the weights of the first m (of all when k < m).

    `temperature` matters to `softmax` only.
    """
    if policy == "proportional":
        return proportional(ordered[:m])
    if policy == "softmax":
        return softmax(ordered[:m], temperature)
    return hydra_minmax(ordered, m)


def proportional(best: Sequence[float]) -> list[float]:
    """Chosen scores -> score / Σ score. Negative scores count as 0; if none is positive, the best gets 1."""
    positive = [max(score, 0.0) for score in best]
    total = sum(positive)
    return [score / total for score in positive] if total > 0 else _only_first(len(best))


def softmax(ordered: Sequence[float], temperature: float) -> list[float]:
    """exp(score / temperature) of scores with the largest first, normalised to Σ = 1."""
    powers = [math.exp((score - ordered[0]) / temperature) for score in ordered]
    total = sum(powers)
    return [power / total for power in powers]


def entropy(ordered: Sequence[float], temperature: float) -> float:
    """-Σ p log p of p = softmax(score / temperature), in nats; the largest score comes first.

    With x = (score - largest) / temperature and Z = Σ exp(x) that is log Z - Σ p x, two terms that are never
    negative: nothing cancels, and a p that underflows to 0 needs no logarithm.
    """
    shifted = [(score - ordered[0]) / temperature for score in ordered]
    powers = [math.exp(x) for x in shifted]
    total = sum(powers)
    return math.log(total) - sum(power * x for power, x in zip(powers, shifted, strict=True)) / total


def hydra_minmax(ordered: Sequence[float], m: int) -> list[float]:
    """hydra-moe's weights with its alpha left out: zero all but the first m, then min-max over all k scores.

    With fewer chosen than experts the minimum is 0, so the best weighs 1 and the others score / best. With
    every expert chosen the worst weighs 0, as in the original. Two cases the original does not survive are
    defined here: when all k are chosen and tied (it divides by zero) each weighs 1, the limit of score /
    best; negative scores, which it never sees, count as 0, and if none is positive the best alone weighs 1.
    """
    kept = [max(score, 0.0) for score in ordered[:m]]
    low = kept[-1] if m >= len(ordered) else 0.0
    high = kept[0]
    if high <= 0:
        return _only_first(len(kept))
    if high == low:
        return [1.0] * len(kept)
    return [(score - low) / (high - low) for score in kept]


def _only_first(count: int) -> list[float]:
    return [1.0] + [0.0] * (count - 1)
