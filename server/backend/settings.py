"""The settings of what stands behind loramux."""

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import NoDecode

from loramux.server.section import Section, split


class BackendSettings(Section):
    """Servers that generate in place of this process; the rest of `engine` and `residency` is theirs then."""

    urls: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Servers that generate in place of this process, as `http://host:port`; empty: none.",
    )
    kind: Literal["vllm"] = Field(default="vllm", description="What they are.")
    api_key: SecretStr | None = Field(default=None, description="Key that is sent to them.")
    any_base: bool = Field(
        default=False, description="Take their base for the pool's, whatever they call it."
    )
    folder: Path | None = Field(
        default=None,
        description="Where blends are written for vLLM to read; unset: a folder in the user's cache.",
    )
    folder_there: str | None = Field(
        default=None, description="That folder as vLLM sees it, where that is another path."
    )
    bytes: int = Field(
        default=2**33, ge=2**20, description="Bytes of that folder; the blends used least lately go first."
    )
    max_lora_rank: Literal[1, 8, 16, 32, 64, 128, 256, 320, 512] = Field(
        default=16, description="What vLLM was started with as `--max-lora-rank`."
    )
    max_cpu_loras: int = Field(
        default=32, ge=1, description="What vLLM was started with as `--max-cpu-loras`, or a little less."
    )
    too_wide: Literal["svd", "refuse"] = Field(
        default="svd",
        description="What becomes of an exact blend of a larger rank: its best approximation, or a 400.",
    )
    silent_seconds: float = Field(
        default=300.0, gt=0, le=3600, description="A backend that sends nothing for so long counts as down."
    )

    @field_validator("urls", mode="before")
    @classmethod
    def _split_urls(cls, value: object) -> object:
        return split(value)

    @field_validator("urls")
    @classmethod
    def _are_urls(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for url in value:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
                raise ValueError(f"{url!r} is not like http://host:port")
        if len({url.rstrip("/") for url in value}) < len(value):
            raise ValueError("a backend is named twice")
        return value
