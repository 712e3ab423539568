"""Items of `/v1/responses`: those of an input, as turns of a chat, and the JSON of those of an output."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, WithJsonSchema

from loramux.server.text.prompts import Turn
from loramux.server.text.tool_calls import ToolCall
from loramux.server.wire.strict import StrictModel
from loramux.server.wire.tools import Arguments, FunctionName, described_call

# What the parts of an answer are called, and the field that has their text.
_PARTS = {"input_text": "text", "output_text": "text", "refusal": "refusal"}
# What is beside it in an answer that is put back, and says nothing to a model.
_BESIDE = {"annotations", "logprobs", "prompt_cache_breakpoint"}
_CONTENT = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "anyOf": [
                    {
                        "type": "object",
                        "required": ["type", field],
                        "properties": {"type": {"const": kind}, field: {"type": "string"}},
                    }
                    for kind, field in _PARTS.items()
                ]
            },
        },
    ],
    "description": "A text, or its parts.",
}


def _joined(value: object) -> object:
    return "".join(_part(part) for part in value) if isinstance(value, list) else value


def _part(part: object) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    field = _PARTS.get(kind) if isinstance(kind, str) else None
    if not isinstance(part, dict) or field is None:
        raise ValueError(f"parts of type {str(kind)[:40]!r} are not supported by this server")
    text = part.get(field)
    if set(part) - _BESIDE != {"type", field} or not isinstance(text, str):
        raise ValueError(f"a part of type {kind} has exactly the fields type and {field}")
    return text


Content = Annotated[str, BeforeValidator(_joined), WithJsonSchema(_CONTENT)]
CallId = Annotated[str, Field(min_length=1, max_length=256)]


class _Item(StrictModel):
    """What items have in common, as they are in an answer that is put back."""

    id: str | None = Field(None, max_length=256)
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class InputMessage(_Item):
    """A message of the input, or one of an earlier answer put back as it came."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    phase: Literal["commentary", "final_answer"] | None = None


class FunctionCall(_Item):
    """A call of an earlier answer."""

    type: Literal["function_call"]
    call_id: CallId
    name: FunctionName
    arguments: Arguments

    UNSUPPORTED: ClassVar[frozenset[str]] = frozenset({"async", "async_", "caller", "namespace"})


class FunctionCallOutput(_Item):
    """What a function that was called has returned."""

    type: Literal["function_call_output"]
    call_id: CallId
    output: Content

    UNSUPPORTED: ClassVar[frozenset[str]] = frozenset({"caller", "name", "namespace"})


_KINDS: dict[str, type[_Item]] = {
    "message": InputMessage, "function_call": FunctionCall, "function_call_output": FunctionCallOutput,
}  # fmt: skip


def _item(value: object, info: ValidationInfo) -> object:
    """As the type that it says it is, so that a mistake in it is laid at its own door."""
    kind = value.get("type", "message") if isinstance(value, dict) else "message"
    if kind == "item_reference":
        raise ValueError("nothing is stored to refer to; send the item itself (store: false)")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"items of type {str(kind)[:40]!r} are not supported by this server")
    return _KINDS[kind].model_validate(value, context=info.context)


InputItem = Annotated[InputMessage | FunctionCall | FunctionCallOutput, BeforeValidator(_item)]


def turns(items: Sequence[InputMessage | FunctionCall | FunctionCallOutput]) -> list[Turn]:
    """The chat that the items are: calls belong to the assistant's turn before them, as chats have them."""
    chat: list[dict[str, Any]] = []
    for item in items:
        match item:
            case InputMessage():
                chat.append({"role": item.role, "content": item.content})
            case FunctionCallOutput():
                chat.append({"role": "tool", "content": item.output, "tool_call_id": item.call_id})
            case FunctionCall():
                if not chat or chat[-1]["role"] != "assistant":
                    chat.append({"role": "assistant", "content": ""})
                call = described_call(item.call_id, item.name, item.arguments)
                chat[-1].setdefault("tool_calls", []).append(call)
    return list(chat)


def output_text(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    """The only part of a message here."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def output_message(id: str, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    """A message of an output."""
    return {"id": id, "type": "message", "status": status, "role": "assistant", "content": content}


def output_call(id: str, status: str, call: ToolCall, arguments: str) -> dict[str, Any]:
    """A call of an output, with what is known of its arguments."""
    return {
        "id": id, "type": "function_call", "status": status, "call_id": call.id, "name": call.name,
        "arguments": arguments,
    }  # fmt: skip
