"""Adapter administration: requests with vLLM's field names."""

from pydantic import Field, ValidationInfo, field_validator

from loramux.adapters.sparse.options import ReadOptions
from loramux.server.wire.strict import StrictModel, field_error, limits_of, no_longer_than


class LoadAdapterRequest(StrictModel):
    """`lora_path` is relative to the configured adapter root, or absolute and below it. The flags are those
    of `ReadOptions`; all but the first are for sparse models alone. `routing_examples` are texts that a LoRA
    should answer."""

    lora_name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    lora_path: str = Field(min_length=1, max_length=1024)
    any_base: bool = False
    allow_missing_dora: bool = False
    bypass_router: bool = False
    replay_capacity: bool = False
    routing_examples: list[str] | None = Field(None, min_length=1)

    @field_validator("routing_examples", mode="before")
    @classmethod
    def _few_enough(cls, value: object, info: ValidationInfo) -> object:
        return no_longer_than(value, limits_of(info).max_routing_examples)

    @field_validator("routing_examples")
    @classmethod
    def _short_enough(cls, value: list[str] | None, info: ValidationInfo) -> list[str] | None:
        longest = limits_of(info).max_routing_example_length
        for number, text in enumerate(value or ()):
            if not 1 <= len(text) <= longest:
                raise field_error(
                    f"routing_examples[{number}]", f"has {len(text)} characters; 1 to {longest} are allowed"
                )
        return value

    @property
    def options(self) -> ReadOptions:
        return ReadOptions.of(self)


class UnloadAdapterRequest(StrictModel):
    """The expert to take out."""

    lora_name: str = Field(min_length=1, max_length=64)
