"""Adapter administration: requests with vLLM's field names."""

from pydantic import Field

from loramux.server.wire.strict import StrictModel


class LoadAdapterRequest(StrictModel):
    """`lora_path` is relative to the configured adapter root, or absolute and below it."""

    lora_name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    lora_path: str = Field(min_length=1, max_length=1024)


class UnloadAdapterRequest(StrictModel):
    """The expert to take out."""

    lora_name: str = Field(min_length=1, max_length=64)
