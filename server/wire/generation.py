"""What chat and completions requests have in common."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, WithJsonSchema, field_validator, model_validator

from loramux.server.engine.protocol import LEAST_TEMPERATURE
from loramux.server.sampling_settings import MinP, RepetitionPenalty, Temperature, TopK, TopP
from loramux.server.wire.strict import (
    MAX_TOKENS,
    StrictModel,
    TokenId,
    at_most,
    field_error,
    limits_of,
    no_longer_than,
)
from loramux.server.wire.structured import StructuredFields

INT64 = 2**63
LOGO = "logo"
#: Strategies by which every token chooses for itself.
BY_TOKEN = ("arrow", "spectr")
#: Fields of `routing` that mean nothing with a strategy: with all others, those of no strategy.
_MEANINGLESS: Mapping[str | None, tuple[str, ...]] = {
    **dict.fromkeys(BY_TOKEN, ("policy", "threshold", "merge", "signal")),
    LOGO: ("policy", "threshold", "temperature"),
    None: ("signal",),
}
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


_TEXT = {"type": "string", "minLength": 1}
_STOP = {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]}
_TEMPERATURE = {
    "anyOf": [{"const": 0}, {"type": "number", "minimum": LEAST_TEMPERATURE, "maximum": 2}],
    "default": 1.0,
}


class StreamOptions(StrictModel):
    """`stream_options`. `continuous_usage_stats` is vLLM's and goes with `include_usage`: the counts so far
    in every chunk. Nothing is obfuscated here, so asking for it makes no difference."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False

    @property
    def continuous_usage(self) -> bool:
        return self.include_usage and self.continuous_usage_stats


class LoraScale(StrictModel):
    """One entry of the client's own mixture."""

    id: str = Field(min_length=1, max_length=64)
    scale: float = Field(1.0, ge=-64, le=64)


class RoutingFields(StrictModel):
    """`routing`: what the client changes of the routing defaults.

    `arrow` and `spectr` route token by token, so what decides about a whole prompt does not go with them, and
    `logo` weighs by the experts' own signals, so what makes weights of scores does not go with it.
    """

    strategy: Literal["similarity", "classifier", "hybrid", "arrow", "spectr", "logo"] | None = None
    top_m: int | None = Field(None, ge=1)
    policy: Literal["proportional", "softmax", "hydra_minmax"] | None = None
    temperature: float | None = Field(None, ge=1e-4, le=1000)
    threshold: float | None = Field(None, ge=-1000, le=1000)
    merge: str | None = Field(None, min_length=1, max_length=32)
    signal: Literal["norm", "entropy"] | None = None
    explain: bool = False

    @field_validator("top_m")
    @classmethod
    def _bounded(cls, value: int | None, info: ValidationInfo) -> int | None:
        return at_most(value, limits_of(info).max_experts)

    @model_validator(mode="after")
    def _fits_the_strategy(self) -> Self:
        if self.strategy is not None and (misfit := self.misfit(self.strategy)):
            raise field_error(f"routing.{misfit}", f"means nothing with strategy {self.strategy}")
        return self

    def misfit(self, strategy: str) -> str | None:
        """The field that means nothing with a strategy, if there is one."""
        meaningless = _MEANINGLESS.get(strategy, _MEANINGLESS[None])
        return next((name for name in meaningless if getattr(self, name) is not None), None)


class GenerationFields(StructuredFields):
    """The fields that chat and completions have in common."""

    model: str = Field(min_length=1, max_length=256)
    max_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)
    temperature: Annotated[Temperature, WithJsonSchema(_TEMPERATURE)] = 1.0
    top_p: TopP = 1.0
    top_k: TopK = 0
    min_p: MinP = 0.0
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: RepetitionPenalty = 1.0
    seed: int | None = Field(None, ge=-INT64, le=INT64 - 1)
    n: int = Field(1, ge=1)
    stop: Annotated[list[str], WithJsonSchema(_STOP)] = Field(default_factory=list)
    stop_token_ids: list[TokenId] = Field(default_factory=list)
    ignore_eos: bool = False
    logit_bias: dict[int, float] = Field(default_factory=dict)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=512)
    lora: list[LoraScale] | None = None
    routing: RoutingFields | None = None

    UNSUPPORTED: ClassVar[frozenset[str]] = frozenset(
        {
            "audio", "best_of", "function_call", "functions", "metadata", "modalities", "moderation",
            "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_retention",
            "reasoning_effort", "safety_identifier", "service_tier", "store", "suffix", "tool_choice",
            "tools", "verbosity", "web_search_options",
        }
    )  # fmt: skip

    @property
    def explains(self) -> bool:
        """Whether the answer says what routing did to the prompt's own loss."""
        return self.routing is not None and self.routing.explain

    @field_validator("n")
    @classmethod
    def _n(cls, value: int, info: ValidationInfo) -> int:
        return at_most(value, limits_of(info).max_n)

    @field_validator("stop", mode="before")
    @classmethod
    def _stop(cls, value: object, info: ValidationInfo) -> list[str]:
        limits = limits_of(info)
        stops = [value] if isinstance(value, str) else value
        if not isinstance(stops, list):
            raise ValueError("must be a string or a list of strings")
        no_longer_than(stops, limits.max_stop)
        for stop in stops:
            if not isinstance(stop, str) or not 1 <= len(stop) <= limits.max_stop_length:
                raise ValueError(f"each must be a string of 1 to {limits.max_stop_length} characters")
        return stops

    @field_validator("stop_token_ids", mode="before")
    @classmethod
    def _stop_ids(cls, value: object, info: ValidationInfo) -> object:
        return no_longer_than(value, limits_of(info).max_stop)

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _bias(cls, value: object, info: ValidationInfo) -> object:
        if not isinstance(value, dict):
            raise ValueError("must be an object of token id to bias")
        no_longer_than(value, limits_of(info).max_logit_bias)
        return {_bias_token(key): _bias_amount(key, amount) for key, amount in value.items()}

    @field_validator("lora", mode="before")
    @classmethod
    def _lora(cls, value: object, info: ValidationInfo) -> object:
        return no_longer_than(value, limits_of(info).max_experts)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise field_error("stream_options", "is only allowed when stream is true")
        if self.lora is not None:
            ids = [entry.id for entry in self.lora]
            if not ids:
                raise field_error("lora", "must name at least one expert; leave it out to have none")
            if len(set(ids)) != len(ids):
                raise field_error("lora", "names an expert twice")
            if self.routing is not None:
                raise field_error("routing", "cannot be combined with lora: a given mixture is not routed")
        return self


def _bias_token(key: object) -> int:
    text = str(key)
    if not text.isascii() or not text.isdigit() or len(text) > 10 or int(text) > MAX_TOKENS:
        raise ValueError(f"{text[:20]!r} is not a token id")
    return int(text)


def _bias_amount(key: object, amount: object) -> float:
    if isinstance(amount, bool) or not isinstance(amount, int | float) or not -100 <= amount <= 100:
        raise ValueError(f"the bias of token {str(key)[:20]} must be a number from -100 to 100")
    return float(amount)
