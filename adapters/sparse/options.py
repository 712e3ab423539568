"""What an operator may decide about a sparse model when it is read."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ReadOptions:
    """What an operator may decide about a sparse model.

    Attributes:
        allow_missing_dora: serve a DoRA checkpoint, whose magnitudes were never saved, without DoRA.
        any_base: accept a config that names another base; names and shapes must still fit.
        bypass_router: LoRACoE without its router, as if only the warm-up had been saved: the gate is then
            what `router_bypass` says.
        replay_capacity: switch MixLoRA drops the tokens over the capacity it was trained with.
    """

    allow_missing_dora: bool = False
    any_base: bool = False
    bypass_router: bool = False
    replay_capacity: bool = False


DEFAULT = ReadOptions()
