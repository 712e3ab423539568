"""Every setting, its default and its meaning; the only file that reads the environment.

Order of precedence: command-line flag, environment (`LORAMUX_LIMITS__MAX_N` is `limits.max_n`), YAML file,
default. A key that is not a setting stops the start, wherever it was written.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from loramux.server.backend.settings import BackendSettings
from loramux.server.errors import StartError
from loramux.server.routing_settings import RoutingSettings
from loramux.server.sampling_settings import SamplingSettings
from loramux.server.section import Section, split

ENV_PREFIX = "LORAMUX_"
CONFIG_VARIABLE = "LORAMUX_CONFIG"
DEFAULT_POOL = Path(__file__).parent / "default_pool"


class Limits(Section):
    """What one request may ask for. Over a limit is a 400 that names the field (a 413 for the body)."""

    max_body_bytes: int = Field(default=4 * 1024 * 1024, ge=1024, description="Bytes of one request body.")
    max_n: int = Field(default=16, ge=1, description="`n`, choices per prompt.")
    max_prompts: int = Field(default=16, ge=1, description="Prompts in one completions request.")
    max_sequences: int = Field(default=64, ge=1, description="Prompts times `n` in one request.")
    max_messages: int = Field(default=1024, ge=1, description="Messages in one chat request.")
    max_stop: int = Field(default=16, ge=1, description="Stop strings, and apart from them stop token ids.")
    max_stop_length: int = Field(default=256, ge=1, description="Characters of one stop string.")
    max_logit_bias: int = Field(default=1024, ge=1, description="Entries of `logit_bias`.")
    max_top_logprobs: int = Field(default=20, ge=0, description="Alternatives per token in `logprobs`.")
    max_experts: int = Field(
        default=16, ge=1, description="Experts in `lora`, and the largest `routing.top_m`."
    )
    max_embedding_inputs: int = Field(default=256, ge=1, description="Texts in one embeddings request.")
    max_grammar_bytes: int = Field(
        default=65536,
        ge=64,
        le=2**24,
        description="Bytes of one JSON Schema, regular expression, grammar or list of choices, and of all "
        "tools.",
    )
    max_tools: int = Field(
        default=128, ge=1, description="Tools in one request, and calls in one of its messages."
    )
    max_routing_examples: int = Field(
        default=64, ge=1, description="Texts in `routing_examples` of one adapter."
    )
    max_routing_example_length: int = Field(
        default=8192, ge=1, description="Characters of one text in `routing_examples`."
    )


class EngineSettings(Section):
    """Continuous batching."""

    max_running: int = Field(default=32, ge=1, description="Sequences decoded together.")
    max_waiting: int = Field(
        default=256, ge=1, description="Sequences queued; one more is a 429 with Retry-After."
    )
    kv_tokens: int | None = Field(
        default=None,
        ge=64,
        description="Tokens of key-value cache; unset: `max_running` full contexts, or what memory is left.",
    )
    max_batch_tokens: int = Field(
        default=512, ge=16, description="Tokens of one step; longer prompts are chunked."
    )
    prefix_sharing: bool = Field(
        default=True, description="Share the cache of equal prompt heads within one blend."
    )
    batch_invariant: bool = Field(
        default=False,
        description="On a CPU, in float32: compute a token alone, beside others and in a prompt to the same "
        "last bit.",
    )
    cuda_graphs: Literal["auto", "off"] = Field(
        default="auto",
        description="Capture decode steps at the start on a CUDA device, or run them uncaptured.",
    )


class ResidencySettings(Section):
    """Merged blends kept on the device."""

    bytes: int = Field(
        default=2**30, ge=0, description="Bytes of adapter rows on the device: experts and inexact merges."
    )
    rows: int = Field(
        default=0,
        ge=0,
        le=1 << 20,
        description="Least number of adapter rows, whatever the pool needs: the largest rank that can be "
        "loaded later.",
    )
    preload: bool = Field(
        default=True,
        description="Copy the experts into their rows at the start, so that no request waits for it.",
    )
    sparse_bytes: int = Field(
        default=2**28,
        ge=0,
        description="Bytes on the device for sparse models that are loaded later and for the copies that "
        "arrow and spectr make of their experts.",
    )
    max_blends: int = Field(
        default=4096,
        ge=1,
        description="Blends remembered; an exact one is a small vector over its experts' rows.",
    )
    weight_step: float = Field(
        default=0.01, gt=0, le=0.5, description="Blend weights are rounded to this grid."
    )


class ToolSettings(Section):
    """Calls of tools."""

    format: Literal["auto", "hermes", "llama3", "mistral", "qwen"] = Field(
        default="auto",
        description="How the base writes calls; auto asks its tokenizer: a response template, else what the "
        "chat template speaks of.",
    )


class Settings(BaseSettings):
    """The server's settings."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, env_prefix=ENV_PREFIX, env_nested_delimiter="__", validate_default=True
    )

    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    pool: Path = Field(default=DEFAULT_POOL, description="Pool directory; unset: the pool that ships.")
    verify_pool: bool = Field(
        default=True, description="Compare every file of the pool with its hash at the start."
    )
    base: str | None = Field(
        default=None,
        description="Model folder, GGUF file, package with one, or cached hub id, in place of the pool's.",
    )
    chat_template: Path | None = Field(
        default=None, description="File with a chat template (Jinja) in place of the base's own."
    )
    encoder: str | None = Field(
        default=None,
        description="Directory, package or cached hub id of the encoder that the centroids were made with.",
    )
    device: str = Field(
        default="auto", description="`auto`, `cpu`, `cuda` or `cuda:N`; auto takes CUDA when present."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Of the base's computation and the adapters."
    )
    quantization: Literal["auto", "none", "nf4", "int8", "int4"] = Field(
        default="auto",
        description="Of the base; auto is nf4 on CUDA and none on a CPU, which alone has int8 and int4.",
    )
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        default=(),
        description="Keys that clients must send as `Authorization: Bearer`; empty: no key needed.",
    )
    api_key_file: Path | None = Field(
        default=None, description="File with one API key a line, added to `api_keys`."
    )
    admin_key: SecretStr | None = Field(
        default=None, description="Key of the adapter admin routes; unset: those routes are off."
    )
    adapter_root: Path | None = Field(
        default=None,
        description="Directory under which admin routes may load adapters; unset: the pool's `experts`.",
    )
    metrics: bool = Field(default=True, description="Serve `/metrics`.")
    metrics_need_key: bool = Field(
        default=True, description="Ask for an API key on `/metrics` when keys are set."
    )
    traces: bool = Field(
        default=False,
        description="Export OpenTelemetry traces as the `OTEL_*` variables say; needs `loramux[otel]`.",
    )
    replicas: int = Field(default=0, ge=0, le=64, description="Processes that generate; 0: this one does.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Of the server's log."
    )
    drain_seconds: float = Field(
        default=30.0,
        ge=0,
        description="After SIGTERM, how long running requests may go on before they are ended.",
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Names beside loopback's own that `Host` may have when the server listens on loopback.",
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="Origins whose pages may call this server from a browser; empty: none."
    )
    keep_alive_seconds: int = Field(
        default=75, ge=1, le=3600, description="An idle connection is closed after this long."
    )
    header_seconds: float = Field(
        default=10.0,
        gt=0,
        le=3600,
        description="A connection may take so long to send the head of a request.",
    )
    body_seconds: float = Field(
        default=60.0, gt=0, le=3600, description="A request may take so long to send its body."
    )
    limits: Limits = Limits()
    engine: EngineSettings = EngineSettings()
    backend: BackendSettings = BackendSettings()
    residency: ResidencySettings = ResidencySettings()
    routing: RoutingSettings = RoutingSettings()
    sampling: SamplingSettings = SamplingSettings()
    tools: ToolSettings = ToolSettings()

    @field_validator("api_keys", "allowed_hosts", "cors_origins", mode="before")
    @classmethod
    def _split_keys(cls, value: object) -> object:
        return split(value)

    @field_validator("api_keys")
    @classmethod
    def _no_empty_key(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if not all(key.get_secret_value().strip() for key in value):
            raise ValueError("an API key may not be empty")
        return value

    @field_validator("admin_key")
    @classmethod
    def _no_empty_admin_key(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not value.get_secret_value().strip():
            raise ValueError("the admin key may not be empty; leave it out to turn the admin routes off")
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # `load_settings` has merged every source already, so that building Settings twice cannot differ.
        return (init_settings,)


def load_settings(config: Path | None = None, flags: Mapping[str, object] | None = None) -> Settings:
    """Settings from flags, environment and file, in that order.

    `flags` is nested like the file: `{"limits": {"max_n": 4}}`.

    Raises:
        StartError: an unknown key, a bad value, or a file that cannot be read; names the key or the file.
    """
    try:
        return Settings(**_merged(*(layer for _, layer in _layers(config, flags or {}))))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise StartError(f"unknown setting {key!r}; docs/configuration.md lists all of them") from None
        raise StartError(f"setting {key!r}: {first['msg']}") from None


def setting_sources(config: Path | None = None, flags: Mapping[str, object] | None = None) -> dict[str, str]:
    """Where each setting that is not a default was written, by its dotted name: the place that won.

    Raises:
        StartError: as `load_settings`.
    """
    return {
        name: place
        for place, layer in _layers(config, flags or {})
        for name, _, _ in setting_names()
        if _is_written(layer, name)
    }


def api_keys(settings: Settings) -> tuple[str, ...]:
    """All API keys, those of the file included.

    Raises:
        StartError: the key file is missing, unreadable or holds no key.
    """
    keys = [key.get_secret_value() for key in settings.api_keys]
    if settings.api_key_file is not None:
        try:
            lines = settings.api_key_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise StartError(f"api_key_file {settings.api_key_file}: {error}") from None
        found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not found:
            raise StartError(f"api_key_file {settings.api_key_file} holds no key; write one a line")
        keys += found
    return tuple(keys)


def setting_names(section: type[BaseModel] = Settings, prefix: str = "") -> Iterator[tuple[str, str, object]]:
    """`(dotted name, description, default)` of every setting, in order."""
    for name, info in section.model_fields.items():
        if isinstance(info.default, Section):
            yield from setting_names(type(info.default), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info.description or "", info.default


def _layers(config: Path | None, flags: Mapping[str, object]) -> list[tuple[str, dict[str, Any]]]:
    """What is written, and where; a later place wins."""
    named = config or (Path(value) if (value := os.environ.get(CONFIG_VARIABLE)) else None)
    written = _read_yaml(named) if named else {}
    _refuse_unknown_variables()
    try:
        environment = EnvSettingsSource(Settings)()
    except SettingsError as error:
        raise StartError(f"environment: {error}") from None
    return [(str(named), written), ("environment", environment), ("flag", dict(flags))]


def _is_written(layer: Mapping[str, Any], name: str) -> bool:
    section, dot, rest = name.partition(".")
    if not dot or section not in layer:
        return section in layer
    return isinstance(layer[section], Mapping) and _is_written(layer[section], rest)


def _merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """One mapping; a later layer wins, section by section."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            held = result.get(key)
            if isinstance(held, Mapping) and isinstance(value, Mapping):
                value = _merged(held, value)
            result[key] = value
    return result


def _read_yaml(path: Path) -> dict[str, object]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f"config file {path}: {error}") from None
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise StartError(f"config file {path} is not YAML: {problem}") from None
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise StartError(f"config file {path} must be a mapping of settings")
    return data


def _refuse_unknown_variables() -> None:
    names = [name for name, _, _ in setting_names()]
    sections = {name.partition(".")[0] for name in names if "." in name}
    known = {ENV_PREFIX + name.replace(".", "__").upper() for name in names}
    known |= {ENV_PREFIX + section.upper() for section in sections} | {CONFIG_VARIABLE}
    for variable in sorted(os.environ):
        if variable.upper().startswith(ENV_PREFIX) and variable.upper() not in known:
            raise StartError(
                f"unknown setting in the environment: {variable}; docs/configuration.md lists all"
            )
