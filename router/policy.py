"""From the scores of all experts to the weights of the few that are blended.

    proportional   weight ∝ score among the top m, Σ = 1       (QLoRA-MoE report §3.2, prose)
    softmax        weight ∝ exp(score / temperature) among the top m, Σ = 1
    hydra_minmax   score mapped by min-max to [0, 1], Σ ≠ 1     (hydra-moe `mult_weights_by_alpha`)

All arithmetic is float64. Equal scores are cut in expert order, so a decision never depends on chance, and no
policy returns more than m experts.
"""

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from .errors import RouterError

Policy = Literal["proportional", "softmax", "hydra_minmax"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
Scores = npt.NDArray[np.float64]
Chosen = npt.NDArray[np.int64]


def top_m(scores: Scores, m: int) -> Chosen:
    """Positions of the m largest of [k] scores, best first; ties in position order. Fewer when k < m."""
    return np.argsort(-scores, kind="stable")[:m]


def blend_weights(scores: Scores, m: int, policy: Policy, temperature: float) -> tuple[Chosen, Scores]:
    """Scores [k] -> positions and weights of the chosen experts (at most m), best first.

    `temperature` matters to `softmax` only. Raises RouterError for scores that are not finite.
    """
    if scores.ndim != 1 or not len(scores) or not np.isfinite(scores).all():
        raise RouterError("scores must be a finite vector with one entry per expert")
    chosen = top_m(scores, m)
    if policy == "proportional":
        return chosen, proportional(scores[chosen])
    if policy == "softmax":
        return chosen, softmax(scores[chosen], temperature)
    return chosen, hydra_minmax(scores, chosen)


def proportional(best: Scores) -> Scores:
    """Chosen scores -> score / Σ score. Negative scores count as 0; if none is positive, the best gets 1."""
    positive = np.maximum(best, 0.0)
    total = positive.sum()
    return positive / total if total > 0 else _only_first(len(best))


def softmax(scores: Scores, temperature: float) -> Scores:
    """exp(score / temperature), normalised to Σ = 1; the largest score is subtracted first."""
    powers = np.exp((scores - scores.max()) / temperature)
    return np.asarray(powers / powers.sum(), np.float64)


def hydra_minmax(scores: Scores, chosen: Chosen) -> Scores:
    """hydra-moe's weights with its alpha left out: zero all but the chosen, then min-max over all k scores.

    With fewer chosen than experts the minimum is 0, so the best weighs 1 and the others score / best. With
    every expert chosen the worst weighs 0, as in the original. Two cases the original does not survive are
    defined here: when all k are chosen and tied (it divides by zero) each weighs 1, the limit of score /
    best; negative scores, which it never sees, count as 0, and if none is positive the best alone weighs 1.
    """
    kept = np.zeros_like(scores)
    kept[chosen] = np.maximum(scores[chosen], 0.0)
    low, high = float(kept.min()), float(kept.max())
    if high <= 0:
        return _only_first(len(chosen))
    if high == low:
        return np.ones(len(chosen))
    return np.asarray((kept[chosen] - low) / (high - low), np.float64)


def _only_first(count: int) -> Scores:
    weights = np.zeros(count)
    weights[0] = 1.0
    return weights
