"""A blend: which experts, how much of each, and how they are put together. Its key is the cache key."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from loramux.adapters.errors import BlendError

if TYPE_CHECKING:
    from loramux.adapters.lora import LoraAdapter

DEFAULT_GRID = 0.01
# The least positive float32: what rounds to nothing on this grid is nothing to the operators either.
EXACT_GRID = 2.0**-149
DEFAULT_DENSITY = 0.5
DEFAULT_MAX_WEIGHT = 64.0

METHOD_OPTIONS: dict[str, frozenset[str]] = {
    "exact": frozenset(),
    "svd": frozenset({"rank"}),
    "linear": frozenset(),
    "ties": frozenset({"density"}),
    "dare_linear": frozenset({"density", "seed"}),
    "dare_ties": frozenset({"density", "seed"}),
    "magnitude_prune": frozenset({"density"}),
}
"""Merge method -> the options that change its result; all others are dropped from a blend."""


class BlendPart(NamedTuple):
    """One expert of a blend. The hash is its identity, the id is only for people."""

    expert_id: str
    content_hash: str
    weight: float


class MethodOptions(NamedTuple):
    """A merge method with exactly the options that matter to it; the others are None."""

    method: str
    rank: int | None = None
    density: float | None = None
    seed: int | None = None


def resolve_method(
    method: str, parts: int, *, rank: int | None = None, density: float | None = None, seed: int = 0
) -> MethodOptions:
    """Check a method and its options and drop what cannot change the result.

    One expert alone needs no combining, so every method but a truncating `svd` becomes `exact` for it.

    Args:
        method: a key of `METHOD_OPTIONS`.
        parts: number of experts with a weight other than zero.
        rank: rank of an `svd` result, at least 1; None means the largest rank among the parts.
        density: share of entries kept by `ties`, `dare_*` and `magnitude_prune`, in (0, 1].
        seed: of the random masks of `dare_*`, 0 <= seed < 2**63.

    Raises:
        BlendError: unknown method, or an option out of range, also when the method would not use it.
    """
    if method not in METHOD_OPTIONS:
        raise BlendError(f"unknown merge method {method!r}; known: {', '.join(METHOD_OPTIONS)}")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise BlendError(f"merge rank must be a whole number of at least 1, got {rank!r}")
    kept_share = DEFAULT_DENSITY if density is None else float(density)
    if not 0.0 < kept_share <= 1.0:
        raise BlendError(f"merge density must lie in (0, 1], got {density!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise BlendError(f"merge seed must be a whole number in [0, 2**63), got {seed!r}")
    if parts <= 1 and not (method == "svd" and rank is not None):
        return MethodOptions("exact")
    used = METHOD_OPTIONS[method]
    return MethodOptions(
        method,
        rank=rank if "rank" in used else None,
        density=kept_share if "density" in used else None,
        seed=seed if "seed" in used else None,
    )


@dataclass(frozen=True, eq=False)
class Blend:
    """A canonical mixture of experts. Build it with `Blend.of`; equal blends have equal keys.

    Attributes:
        parts: sorted by content hash, no hash twice, no weight zero; each weight a multiple of `grid`.
        method: merge method, already reduced by `resolve_method`.
        rank, density, seed: its options, None where they do not apply.
        grid: the step that weights were rounded to.
        vanished: True if there were non-zero weights and rounding turned all of them into zero, so that the
            blend is bare although experts were asked for. Not part of the key: bare is bare.
    """

    parts: tuple[BlendPart, ...] = ()
    method: str = "exact"
    rank: int | None = None
    density: float | None = None
    seed: int | None = None
    grid: float = DEFAULT_GRID
    vanished: bool = False

    @classmethod
    def bare(cls) -> Blend:
        """The base model alone."""
        return cls()

    @classmethod
    def of(
        cls,
        parts: Iterable[tuple[str, str, float]],
        *,
        method: str = "exact",
        rank: int | None = None,
        density: float | None = None,
        seed: int = 0,
        grid: float = DEFAULT_GRID,
        max_weight: float = DEFAULT_MAX_WEIGHT,
    ) -> Blend:
        """Make the canonical blend of (expert id, content hash, weight) triples, in any order.

        The same content twice counts once with the summed weight, under the id that sorts first: deltas add,
        so this is what listing an expert twice means. Weights are summed before they are rounded. Rounding
        keeps order, so the strongest expert survives unless every expert rounds to zero; that gives a bare
        blend marked `vanished`.

        Raises:
            BlendError: a weight is not finite or beyond `max_weight` (alone or summed), one id comes with two
                contents, an id or hash is empty, or grid, method or options are not acceptable.
        """
        _check_grid(grid)
        weights: dict[str, list[float]] = {}
        names: dict[str, str] = {}
        for expert_id, content_hash, weight in parts:
            _check_part(expert_id, content_hash, weight, max_weight)
            weights.setdefault(content_hash, []).append(float(weight))
            names[content_hash] = min(expert_id, names.get(content_hash, expert_id))
        _check_names(names)
        # fsum is exact, hence independent of the order of the parts.
        totals = {content_hash: math.fsum(values) for content_hash, values in weights.items()}
        for content_hash, total in totals.items():
            _check_part(names[content_hash], content_hash, total, max_weight)
        steps = {content_hash: round(total / grid) for content_hash, total in totals.items()}
        kept = tuple(
            BlendPart(names[content_hash], content_hash, _weight(steps[content_hash], grid))
            for content_hash in sorted(steps)
            if steps[content_hash] != 0
        )
        chosen = resolve_method(method, len(kept), rank=rank, density=density, seed=seed)
        if not kept:
            return cls(vanished=any(total != 0.0 for total in totals.values()))
        return cls(kept, *chosen, grid=float(grid))

    @property
    def is_bare(self) -> bool:
        """True if no expert takes part."""
        return not self.parts

    @cached_property
    def key(self) -> str:
        """32 hex digits: SHA-256 over content hashes, whole grid steps, grid, method and its options."""
        described = {
            "parts": [[part.content_hash, round(part.weight / self.grid)] for part in self.parts],
            "grid": self.grid if self.parts else None,
            "method": [self.method, self.rank, self.density, self.seed] if self.parts else None,
        }
        text = json.dumps(described, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def weighted(self, experts: Mapping[str, LoraAdapter]) -> list[tuple[LoraAdapter, float]]:
        """Its experts, out of those of a pool by id, with their weights.

        Raises:
            BlendError: one is not there, or has another content now.
        """
        found = []
        for part in self.parts:
            expert = experts.get(part.expert_id)
            if expert is None or expert.content_hash != part.content_hash:
                raise BlendError(f"the expert {part.expert_id!r} is not in the pool any more")
            found.append((expert, part.weight))
        return found

    def __eq__(self, other: object) -> bool:
        return self.key == other.key if isinstance(other, Blend) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.key)


def _weight(steps: int, grid: float) -> float:
    """`steps * grid` without the noise of binary fractions: 29 steps of 0.01 are 0.29."""
    return float(f"{steps * grid:.12g}")


def _check_grid(grid: float) -> None:
    if grid != EXACT_GRID and not (math.isfinite(grid) and 1e-6 <= grid <= 1.0):
        raise BlendError(f"the grid of blend weights must lie in [1e-6, 1], got {grid!r}")


def _check_part(expert_id: str, content_hash: str, weight: float, max_weight: float) -> None:
    if not expert_id or not content_hash:
        raise BlendError(
            f"a blend part needs an expert id and a content hash, got {(expert_id, content_hash)}"
        )
    if not math.isfinite(weight):
        raise BlendError(f"expert {expert_id!r}: weight {weight!r} is not a finite number")
    if abs(weight) > max_weight:
        raise BlendError(f"expert {expert_id!r}: weight {weight!r} is beyond the limit of ±{max_weight:g}")


def _check_names(names: dict[str, str]) -> None:
    """One id must not stand for two contents."""
    owner: dict[str, str] = {}
    for content_hash, expert_id in names.items():
        if expert_id in owner:
            raise BlendError(
                f"expert {expert_id!r} comes with two different contents "
                f"({owner[expert_id][:12]}… and {content_hash[:12]}…)"
            )
        owner[expert_id] = content_hash
