"""What an answer has to look like: `response_format`, and vLLM's `structured_outputs` and `guided_*`."""

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from loramux.server.wire.strict import StrictModel, field_error, limits_of

Kind = Literal["json", "regex", "choice", "grammar"]
#: Any JSON object.
ANY_OBJECT: dict[str, Any] = {"type": "object"}


@dataclass(frozen=True, slots=True)
class Structure:
    """What the answer follows, and the field that says so.

    `given` is a JSON Schema, a regular expression, the texts to choose from, or a grammar.
    """

    kind: Kind
    given: Any
    param: str


def _schema(value: object) -> object:
    """A JSON Schema as an object, which may come as its JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError("is not JSON") from None
    if not isinstance(value, dict):
        raise ValueError("must be a JSON Schema object")
    return value


def _small(value: object, info: ValidationInfo) -> object:
    """`value`, or an error when it is more than a grammar may have."""
    limit = limits_of(info).max_grammar_bytes
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    size = len(text.encode())
    if size > limit:
        raise ValueError(f"has {size} bytes; at most {limit} are allowed")
    return value


Schema = Annotated[dict[str, Any], BeforeValidator(_schema), BeforeValidator(_small)]
Text = Annotated[str, Field(min_length=1), BeforeValidator(_small)]
Choices = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1), BeforeValidator(_small)]


class JsonSchemaFormat(StrictModel):
    """`response_format.json_schema`. The answer follows the schema whether it is `strict` or not."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = Field(None, max_length=4096)
    schema_: Schema = Field(alias="schema", default_factory=lambda: dict(ANY_OBJECT))
    strict: bool = False


class ResponseFormat(StrictModel):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            what = "is required with" if self.json_schema is None else "is only allowed with"
            raise field_error("response_format.json_schema", f"{what} type json_schema")
        return self

    @property
    def structure(self) -> Structure | None:
        if self.type == "text":
            return None
        if self.json_schema is None:
            return Structure("json", ANY_OBJECT, "response_format")
        return Structure("json", self.json_schema.schema_, "response_format.json_schema.schema")


class StructuredOutputs(StrictModel):
    """vLLM's `structured_outputs`: exactly one of the ways to say it."""

    json_: Schema | None = Field(None, alias="json")
    regex: Text | None = None
    choice: Choices | None = None
    grammar: Text | None = None
    json_object: bool = False

    @model_validator(mode="after")
    def _one(self) -> Self:
        if len(self.structures) != 1:
            raise field_error(
                "structured_outputs", "must have exactly one of json, regex, choice, grammar and json_object"
            )
        return self

    @property
    def structures(self) -> list[Structure]:
        return named("structured_outputs.", self.json_, self.regex, self.choice, self.grammar) + (
            [Structure("json", ANY_OBJECT, "structured_outputs.json_object")] if self.json_object else []
        )


class StructuredFields(StrictModel):
    """The fields of a generation that give its answer a structure: at most one of them."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: Text | None = None
    guided_choice: Choices | None = None
    guided_grammar: Text | None = None

    @model_validator(mode="after")
    def _one_structure(self) -> Self:
        if len(found := self._structures) > 1:
            raise field_error(found[1].param, f"cannot be combined with {found[0].param}")
        return self

    @property
    def structure(self) -> Structure | None:
        """What the answer has to follow."""
        return next(iter(self._structures), None)

    @property
    def _structures(self) -> list[Structure]:
        formatted = None if self.response_format is None else self.response_format.structure
        return [
            *([] if formatted is None else [formatted]),
            *([] if self.structured_outputs is None else self.structured_outputs.structures),
            *named("guided_", self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar),
        ]


def named(
    prefix: str,
    schema: dict[str, Any] | None,
    regex: str | None,
    choice: list[str] | None,
    grammar: str | None,
) -> list[Structure]:
    """Those that are given, with the names of their fields."""
    given: tuple[tuple[Kind, Any], ...] = (
        ("json", schema), ("regex", regex), ("choice", choice), ("grammar", grammar),
    )  # fmt: skip
    return [Structure(kind, value, prefix + kind) for kind, value in given if value is not None]
