"""Tools: what a client offers, which it wants called, and calls that were made before."""

import json
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from loramux.server.wire.strict import StrictModel, field_error, limits_of, no_longer_than

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
#: Of chats, with a tool's function as an object in it, and of Responses, with its fields beside the type.
CHAT_SCHEMAS, RESPONSE_SCHEMAS = "tools[{}].function.parameters", "tools[{}].parameters"


def _an_object(value: str) -> str:
    try:
        arguments = json.loads(value or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise ValueError("is not the JSON of an object")
    return value or "{}"


Arguments = Annotated[str, AfterValidator(_an_object)]


class Function(StrictModel):
    """A function that the model may call. Without `parameters` it takes none."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = False

    @field_validator("parameters")
    @classmethod
    def _of_an_object(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value and value.get("type", "object") != "object":
            raise ValueError("must be the JSON Schema of an object")
        if value and not isinstance(value.get("properties", {}), dict):
            raise ValueError("properties must be an object")
        return value

    def described(self) -> dict[str, Any]:
        """As chat templates take it."""
        function = {"name": self.name, "parameters": self.parameters or NO_PARAMETERS}
        if self.description is not None:
            function["description"] = self.description
        return {"type": "function", "function": function}


NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


class _OfFunctions(StrictModel):
    """Tools of other types run on a server, which this one does not do."""

    type: Literal["function"]


class Tool(_OfFunctions):
    """An entry of `tools`."""

    function: Function


class FunctionTool(Function, _OfFunctions):
    """An entry of `tools` of Responses."""


class NamedFunction(StrictModel):
    """The function of a `tool_choice`."""

    name: FunctionName


class NamedChoice(_OfFunctions):
    """A `tool_choice` that names the function to be called."""

    function: NamedFunction


class NamedFunctionTool(NamedFunction, _OfFunctions):
    """The same of Responses."""


Choice = Literal["none", "auto", "required"]


@dataclass(frozen=True, slots=True)
class Offer:
    """The functions that a request offers, which has to be called if any, and whether several may be.

    `schemas` is the name of the field with the schema of the function of a number.
    """

    functions: tuple[Function, ...]
    choice: Choice
    named: str | None
    parallel: bool
    schemas: str = CHAT_SCHEMAS


class ToolFields(StrictModel):
    """The fields of a chat about tools."""

    tools: list[Tool] | None = None
    tool_choice: Choice | NamedChoice | None = None
    parallel_tool_calls: bool = True

    NAMED: ClassVar[type[StrictModel]] = NamedChoice
    NAME: ClassVar[str] = "function.name"

    @field_validator("tools", mode="before")
    @classmethod
    def _few_and_small(cls, value: object, info: ValidationInfo) -> object:
        limits = limits_of(info)
        no_longer_than(value, limits.max_tools)
        if isinstance(value, list) and (size := len(json.dumps(value))) > limits.max_grammar_bytes:
            raise ValueError(f"has {size} bytes; at most {limits.max_grammar_bytes} are allowed")
        return value

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _known_choice(cls, value: object) -> object:
        if isinstance(value, str) and value not in ("none", "auto", "required"):
            raise ValueError("must be none, auto, required, or name a function")
        return cls.NAMED.model_validate(value) if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _tools_fit(self) -> Self:
        offer = self.offer
        names: list[str] = []
        for index, function in enumerate(offer.functions):
            if function.name in names:
                raise field_error(f"tools[{index}].{self.NAME}", "is the name of another tool too")
            names.append(function.name)
        if offer.named is not None and offer.named not in names:
            raise field_error(f"tool_choice.{self.NAME}", "is not the name of one of the tools")
        if offer.choice == "required" and not names:
            raise field_error("tool_choice", "required needs tools")
        return self

    @property
    def offer(self) -> Offer:
        """The fields as one."""
        functions = tuple(tool.function for tool in self.tools or ())
        choice = self.tool_choice
        if isinstance(choice, NamedChoice):
            return Offer(functions, "required", choice.function.name, self.parallel_tool_calls)
        return Offer(functions, choice or "auto", None, self.parallel_tool_calls)


class FunctionToolFields(ToolFields):
    """The same fields of a request of Responses."""

    tools: list[FunctionTool] | None = None  # type: ignore[assignment]
    tool_choice: Choice | NamedFunctionTool | None = None  # type: ignore[assignment]

    NAMED = NamedFunctionTool
    NAME = "name"

    @property
    def offer(self) -> Offer:
        functions: tuple[Function, ...] = tuple(self.tools or ())
        choice = self.tool_choice
        named = choice.name if isinstance(choice, NamedFunctionTool) else None
        rule: Choice = "required" if isinstance(choice, NamedFunctionTool) else choice or "auto"
        return Offer(functions, rule, named, self.parallel_tool_calls, RESPONSE_SCHEMAS)


class CalledFunction(StrictModel):
    """The function of a call, with its arguments as JSON text."""

    name: FunctionName
    arguments: Arguments


class Call(StrictModel):
    """An entry of an assistant's `tool_calls`, put back as it came."""

    id: str = Field(min_length=1, max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None

    def described(self) -> dict[str, Any]:
        """As chat templates take it."""
        return described_call(self.id, self.function.name, self.function.arguments)


def described_call(id: str, name: str, arguments: str) -> dict[str, Any]:
    """A call as chat templates take it: arguments as an object."""
    return {"id": id, "type": "function", "function": {"name": name, "arguments": json.loads(arguments)}}


def _few_calls(value: object, info: ValidationInfo) -> object:
    return no_longer_than(value, limits_of(info).max_tools)


Calls = Annotated[list[Call], BeforeValidator(_few_calls)]
