"""Twenty kinds of JSON, each as a type whose schema constrains an answer and which then reads it back.

All are bounded, so that even a model that says nothing sensible reaches their end.
"""

from enum import Enum, StrEnum
from typing import Annotated, Any, Literal, NamedTuple
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

Word = Annotated[str, Field(min_length=1, max_length=4)]
Small = Annotated[int, Field(ge=-5, le=120)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Colour(StrEnum):
    RED = "red"
    DARK = "dark blue"
    QUOTED = 'a "quoted" one'


class Level(Enum):
    LOW = 1
    HIGH = 10


class Person(Strict):
    name: Word
    age: Annotated[int, Field(ge=0, le=150)]
    nickname: Word | None = None


class Point(Strict):
    x: Small
    y: Small


class Segment(Strict):
    """Shares a definition."""

    start: Point
    end: Point
    label: Annotated[str, Field(pattern="^[A-Z]{2}-[0-9]{3}$")]


class Leaf(Strict):
    value: bool


class Tree(Strict):
    """Refers to itself."""

    leaf: Leaf
    children: Annotated[list["Tree"], Field(max_length=1)] = []


class Cat(Strict):
    kind: Literal["cat"]
    lives: Annotated[int, Field(ge=1, le=9)]


class Dog(Strict):
    kind: Literal["dog"]
    tricks: Annotated[list[Word], Field(max_length=2)]


class Owner(Strict):
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]


class Pair(NamedTuple):
    key: Word
    amount: Small


class Unicode(Strict):
    greeting: Literal["grüß dich", "你好", "👋🏽"]
    straße: Small


class Empty(Strict):
    pass


class Invoice(Strict):
    number: Annotated[int, Field(ge=1, le=99999)]
    lines: Annotated[list[Point | Person], Field(min_length=1, max_length=2)]
    paid: bool | None
    colour: Colour = Colour.RED


TYPES: dict[str, Any] = {
    "object": Person,
    "nested": Segment,
    "empty object": Empty,
    "self-reference": Tree,
    "discriminated union": Owner,
    "invoice": Invoice,
    "unicode": Unicode,
    "integer": Small,
    "multiple": Annotated[int, Field(ge=0, le=500, multiple_of=7)],
    "number": Annotated[float, Field(ge=0, le=3, multiple_of=0.25)],
    "boolean": bool,
    "null": None,
    "string": Annotated[str, Field(max_length=12)],
    "pattern": Annotated[str, Field(pattern=r"^[0-9]{4}-(0[1-9]|1[0-2])$")],
    "uuid": UUID,
    "enum": Colour,
    "integer enum": Level,
    "array": Annotated[list[Small], Field(min_length=2, max_length=4)],
    "tuple": Pair,
    "union": Annotated[list[Small | Word | bool | None], Field(min_length=1, max_length=3)],
}
assert len(TYPES) == 20


def schema(name: str) -> dict[str, Any]:
    """The JSON Schema of a type."""
    return TypeAdapter(TYPES[name]).json_schema()


def read(name: str, text: str) -> Any:
    """The value of an answer; raises where it is not of its type."""
    return TypeAdapter(TYPES[name]).validate_json(text, strict=True)
