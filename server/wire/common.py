"""What chat and completions requests share, and how a validation error becomes a field's name."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from loramux.server.errors import RequestError
from loramux.server.settings import Limits

INT64 = 2**63
MAX_TOKENS = 2**31 - 1

TokenId = Annotated[int, Field(ge=0, le=MAX_TOKENS)]


Amount = TypeVar("Amount", int, int | None)


class StrictModel(BaseModel):
    """Unknown fields and wrong JSON types are errors; `null` for an optional field is its default."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    UNSUPPORTED: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        fields = cls.model_fields
        droppable = {name for name, info in fields.items() if not info.is_required()} | cls.UNSUPPORTED
        return {key: item for key, item in value.items() if item is not None or key not in droppable}


class StreamOptions(StrictModel):
    """`stream_options`."""

    include_usage: bool = False


class LoraScale(StrictModel):
    """One entry of the client's own mixture."""

    id: str = Field(min_length=1, max_length=64)
    scale: float = Field(1.0, ge=-64, le=64)


class RoutingFields(StrictModel):
    """`routing`: what the client changes of the routing defaults."""

    strategy: Literal["similarity", "classifier", "hybrid"] | None = None
    top_m: int | None = Field(None, ge=1)
    policy: Literal["proportional", "softmax", "hydra_minmax"] | None = None
    temperature: float | None = Field(None, gt=0, le=1000)
    threshold: float | None = Field(None, ge=-1000, le=1000)
    merge: str | None = Field(None, min_length=1, max_length=32)

    @field_validator("top_m")
    @classmethod
    def _bounded(cls, value: int | None, info: ValidationInfo) -> int | None:
        return at_most(value, limits_of(info).max_experts)


class GenerationFields(StrictModel):
    """The fields that chat and completions have in common."""

    model: str = Field(min_length=1, max_length=256)
    max_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=MAX_TOKENS)
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    seed: int | None = Field(None, ge=-INT64, le=INT64 - 1)
    n: int = Field(1, ge=1)
    stop: list[str] = Field(default_factory=list)
    stop_token_ids: list[TokenId] = Field(default_factory=list)
    ignore_eos: bool = False
    logit_bias: dict[int, float] = Field(default_factory=dict)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=512)
    lora: list[LoraScale] | None = None
    routing: RoutingFields | None = None

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


class _FieldError(ValueError):
    """A failure of several fields together, laid at the door of one."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


def field_error(param: str, message: str) -> ValueError:
    """For a model validator: an error that names `param` although the whole model was checked."""
    return _FieldError(param, message)


def limits_of(info: ValidationInfo) -> Limits:
    """The limits that `parse` passed in."""
    limits = info.context
    if not isinstance(limits, Limits):
        raise TypeError("request models are validated through parse(), which passes the limits")
    return limits


def at_most(value: Amount, limit: int) -> Amount:
    """`value`, or an error when it is a number over `limit`."""
    if value is not None and value > limit:
        raise ValueError(f"must be at most {limit}")
    return value


def no_longer_than(value: object, limit: int) -> object:
    """`value`, or an error when it is a list or object of more than `limit` entries."""
    if isinstance(value, list | dict) and len(value) > limit:
        raise ValueError(f"has {len(value)} entries; at most {limit} are allowed")
    return value


Model = TypeVar("Model", bound=StrictModel)


def parse(model: type[Model], body: object, limits: Limits) -> Model:
    """`body`, already decoded from JSON, as `model`.

    Raises:
        RequestError: names the first field at fault.
    """
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object", code="invalid_json")
    for name in model.UNSUPPORTED:
        if body.get(name) is not None:
            raise RequestError(
                f"{name} is not supported by this server", param=name, code="unsupported_field"
            )
    try:
        return model.model_validate(body, context=limits)
    except ValidationError as error:
        raise _request_error(error) from None


def encode_json(value: Mapping[str, Any]) -> bytes:
    """Compact UTF-8 JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def _request_error(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, _FieldError):
        return RequestError(f"{cause.param} {cause}", param=cause.param, code="invalid_value")
    param = _path(first["loc"])
    if first["type"] == "extra_forbidden":
        return RequestError(f"unknown field {param}", param=param, code="unknown_field")
    if first["type"] == "missing":
        return RequestError(f"{param} is required", param=param, code="missing_field")
    detail = str(cause) if isinstance(cause, ValueError) else first["msg"]
    return RequestError(f"{param}: {detail}", param=param, code="invalid_value")


def _path(loc: tuple[int | str, ...]) -> str:
    """`messages[0].content` from a pydantic location; a name the client made up is cut short."""
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part[:100]}"
    return path.removeprefix(".") or "body"


def _bias_token(key: object) -> int:
    text = str(key)
    if not text.isascii() or not text.isdigit() or len(text) > 10 or int(text) > MAX_TOKENS:
        raise ValueError(f"{text[:20]!r} is not a token id")
    return int(text)


def _bias_amount(key: object, amount: object) -> float:
    if isinstance(amount, bool) or not isinstance(amount, int | float) or not -100 <= amount <= 100:
        raise ValueError(f"the bias of token {str(key)[:20]} must be a number from -100 to 100")
    return float(amount)
