"""Strict request models: how a JSON object becomes one, and how a failure becomes the name of a field."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import CoreSchema

from loramux.server.errors import RequestError
from loramux.server.settings import Limits
from loramux.server.wire.wording import worded

MAX_TOKENS = 2**31 - 1

# Fields of OpenAI's messages that exist and are not served.
NESTED_UNSUPPORTED = frozenset({"function_call", "audio", "refusal", "annotations"})
_NAMED = NESTED_UNSUPPORTED | {"summary", "generate_summary"}

TokenId = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
# Made once: json.dumps would make one for every chunk of every stream.
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)
_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}

Amount = TypeVar("Amount", int, int | None)


class StrictModel(BaseModel):
    """Unknown fields and wrong JSON types are errors; `null` for an optional field is its default."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    UNSUPPORTED: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """With what the validators take beside the declared types: null, and what asks for nothing."""
        schema = handler(core_schema)
        declared = handler.resolve_ref_schema(schema)
        fields, required = declared.setdefault("properties", {}), declared.get("required", ())
        for name in set(fields) - set(required):
            if _NULL not in fields[name].get("anyOf", ()):
                fields[name] = {"anyOf": [fields[name], _NULL]}
        for name in sorted(cls.UNSUPPORTED):
            fields[name] = {"description": "Not supported.", "enum": [*_DEFAULTS.get(name, ()), None]}
            if name in _LABELS:
                fields[name] = {
                    "description": "Accepted, and ignored.", "type": [_LABEL_TYPES[_LABELS[name]], "null"],
                }  # fmt: skip
        return schema

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        fields = cls.model_fields
        droppable = {name for name, info in fields.items() if not info.is_required()} | cls.UNSUPPORTED
        return {
            key: item
            for key, item in value.items()
            if key not in droppable
            or not (item is None or (key in cls.UNSUPPORTED and asks_nothing(key, item)))
        }


_NULL = {"type": "null"}
_LABEL_TYPES: Mapping[type, str] = {dict: "object", str: "string", bool: "boolean"}
# Fields that label a request, or that hold the value which they have when they are left out.
_LABELS = {"metadata": dict, "prompt_cache_key": str, "safety_identifier": str, "parallel_tool_calls": bool}
_DEFAULTS: dict[str, tuple[object, ...]] = {
    "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"),
    "store": (False,), "service_tier": ("auto", "default"), "best_of": (1,), "modalities": (["text"],),
    "suffix": ("",), "echo": (False,), "background": (False,), "reasoning_effort": ("none",),
}  # fmt: skip


def asks_nothing(name: str, value: object) -> bool:
    """Whether an unsupported field holds a value that leaves the answer as it is without the field."""
    label = _LABELS.get(name)
    if label is not None:
        return isinstance(value, label)
    return any(type(value) is type(default) and value == default for default in _DEFAULTS.get(name, ()))


class _FieldError(ValueError):
    """A failure of several fields together, laid at the door of one."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


def field_error(param: str, message: str) -> ValueError:
    """For a model validator: an error that names `param` although the whole model was checked; a `param` that
    begins with a dot is one of that model, wherever it stands."""
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
        if body.get(name) is not None and not asks_nothing(name, body[name]):
            raise RequestError(
                f"{name} is not supported by this server", param=name, code="unsupported_field"
            )
    try:
        return model.model_validate(body, context=limits)
    except ValidationError as error:
        raise _request_error(error) from None


def encode_json(value: Mapping[str, Any]) -> bytes:
    """Compact UTF-8 JSON, in which nothing ends a line.

    JSON leaves U+0085, U+2028 and U+2029 as they are; clients that cut a stream with their language's own
    idea of lines (Python's `splitlines`, httpx's `iter_lines`) would cut an event there.
    """
    text = _ENCODER.encode(value)
    return (text if text.isascii() else text.translate(_LINE_ENDS)).encode()


def _request_error(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, _FieldError):
        param = _path(first["loc"]) + cause.param if cause.param.startswith(".") else cause.param
        return RequestError(f"{param} {cause}", param=param, code="invalid_value")
    param = _path(first["loc"])
    if first["type"] == "extra_forbidden" and first["loc"][-1] in _NAMED:
        return RequestError(f"{param} is not supported by this server", param=param, code="unsupported_field")
    if first["type"] == "extra_forbidden":
        return RequestError(f"unknown field {param}", param=param, code="unknown_field")
    if first["type"] == "missing":
        return RequestError(f"{param} is required", param=param, code="missing_field")
    return RequestError(f"{param}: {worded(first)}", param=param, code="invalid_value")


def _path(loc: tuple[int | str, ...]) -> str:
    """`messages[0].content` from a pydantic location; a name the client made up is cut short."""
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part[:100]}"
    return path.removeprefix(".") or "body"
