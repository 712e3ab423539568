"""Tools of a chat: what a client offers, which it wants called, and calls that were made before."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from loramux.server.wire.strict import StrictModel, field_error, limits_of, no_longer_than

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


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


class Tool(StrictModel):
    """An entry of `tools`."""

    type: Literal["function"]
    function: Function

    def described(self) -> dict[str, Any]:
        """As chat templates take it."""
        function = {"name": self.function.name, "parameters": self.function.parameters or NO_PARAMETERS}
        if self.function.description is not None:
            function["description"] = self.function.description
        return {"type": "function", "function": function}


NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


class NamedFunction(StrictModel):
    """The function of a `tool_choice`."""

    name: FunctionName


class NamedChoice(StrictModel):
    """A `tool_choice` that names the function to be called."""

    type: Literal["function"]
    function: NamedFunction


class ToolFields(StrictModel):
    """The fields of a chat about tools."""

    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool = True

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
        return NamedChoice.model_validate(value) if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _tools_fit(self) -> Self:
        names: list[str] = []
        for index, tool in enumerate(self.tools or ()):
            if tool.function.name in names:
                raise field_error(f"tools[{index}].function.name", "is the name of another tool too")
            names.append(tool.function.name)
        if self.tool_choice == "required" and not names:
            raise field_error("tool_choice", "required needs tools")
        if isinstance(self.tool_choice, NamedChoice) and self.tool_choice.function.name not in names:
            raise field_error("tool_choice.function.name", "is not the name of one of the tools")
        return self


class CalledFunction(StrictModel):
    """The function of a call, with its arguments as JSON text."""

    name: FunctionName
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _an_object(cls, value: str) -> str:
        try:
            arguments = json.loads(value or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise ValueError("is not the JSON of an object")
        return value or "{}"


class Call(StrictModel):
    """An entry of an assistant's `tool_calls`, put back as it came."""

    id: str = Field(min_length=1, max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None

    def described(self) -> dict[str, Any]:
        """As chat templates take it: arguments as an object."""
        function = {"name": self.function.name, "arguments": json.loads(self.function.arguments)}
        return {"id": self.id, "type": self.type, "function": function}


def _few_calls(value: object, info: ValidationInfo) -> object:
    return no_longer_than(value, limits_of(info).max_tools)


Calls = Annotated[list[Call], BeforeValidator(_few_calls)]
