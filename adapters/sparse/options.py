"""What an operator may decide about a sparse model when it is read."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class ReadOptions:
    """What an operator may decide about a sparse model.

    Attributes:
        any_base: accept a config that names another base; names and shapes must still fit.
        allow_missing_dora: serve a DoRA checkpoint, whose magnitudes were never saved, without DoRA.
        bypass_router: LoRACoE without its router, as if only the warm-up had been saved: the gate is then
            what `router_bypass` says.
        replay_capacity: switch MixLoRA drops the tokens over the capacity it was trained with.
    """

    any_base: bool = False
    allow_missing_dora: bool = False
    bypass_router: bool = False
    replay_capacity: bool = False

    @classmethod
    def of(cls, source: object) -> ReadOptions:
        """From an object that has the same fields among its own, such as an entry of a manifest."""
        return cls(**{field.name: getattr(source, field.name) for field in fields(cls)})


DEFAULT = ReadOptions()
