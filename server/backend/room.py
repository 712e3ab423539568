"""What backends take of blends: how many, how wide, how large."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from loramux.adapters.errors import BlendError
from loramux.adapters.lora import LoraAdapter
from loramux.server.backend.settings import BackendSettings
from loramux.server.backend.vllm import RANKS


@dataclass(frozen=True, slots=True)
class Room:
    """What the backends take.

    Attributes:
        ranks: of one adapter, ascending.
        adapters: by name on one server, kept below what its cache holds, so that it never drops one itself.
        nbytes: of all directories on the disk.
        truncate: blends that are too wide are approximated; else they are refused.
    """

    ranks: tuple[int, ...]
    adapters: int
    nbytes: int
    truncate: bool = True

    @classmethod
    def of(cls, settings: BackendSettings) -> Room:
        """As the settings have it."""
        return cls(
            ranks=tuple(rank for rank in RANKS if rank <= settings.max_lora_rank),
            adapters=settings.max_cpu_loras,
            nbytes=settings.bytes,
            truncate=settings.too_wide == "svd",
        )

    def refuse(self, expert: LoraAdapter) -> None:
        """Raises `BlendError` where an expert alone is too wide and may not be truncated."""
        limit = self.ranks[-1]
        if expert.max_rank > limit and not self.truncate:
            raise BlendError(
                f"expert {expert.id!r} has rank {expert.max_rank} and the backends take {limit}; start them "
                "with a larger --max-lora-rank, or set backend.too_wide to svd"
            )

    def narrow(self, experts: Iterable[LoraAdapter], top_m: int) -> tuple[str, str] | None:
        """What becomes of the widest blends of `top_m` experts and what would keep them exact; None where
        they are."""
        limit = self.ranks[-1]
        widest = sum(sorted((expert.max_rank for expert in experts), reverse=True)[:top_m])
        if widest <= limit:
            return None
        enough = next((rank for rank in RANKS if rank >= widest), RANKS[-1])
        fate = "approximated, with its error in the answer" if self.truncate else "refused"
        return (
            f"blends of {top_m} experts have rank up to {widest} and the backends take {limit}: such a blend "
            f"is {fate}",
            f"start them with --max-lora-rank {enough} and set backend.max_lora_rank to have it exact",
        )
