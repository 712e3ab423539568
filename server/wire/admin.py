"""Adapter administration: requests with vLLM's field names."""

from pydantic import Field

from loramux.adapters.sparse.options import ReadOptions
from loramux.server.wire.strict import StrictModel


class LoadAdapterRequest(StrictModel):
    """`lora_path` is relative to the configured adapter root, or absolute and below it. The flags are those
    of `ReadOptions`; all but the first are for sparse models alone."""

    lora_name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    lora_path: str = Field(min_length=1, max_length=1024)
    any_base: bool = False
    allow_missing_dora: bool = False
    bypass_router: bool = False
    replay_capacity: bool = False

    @property
    def options(self) -> ReadOptions:
        return ReadOptions.of(self)


class UnloadAdapterRequest(StrictModel):
    """The expert to take out."""

    lora_name: str = Field(min_length=1, max_length=64)
