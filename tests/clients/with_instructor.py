"""instructor, in each of its modes that a server of this kind can have."""

import asyncio
import json
import warnings
from collections.abc import Iterable
from typing import Annotated

import instructor
from checks import API, ASK, check, finished, started
from instructor import Mode
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field

started("instructor", "openai")
# It says of its older modes which it takes in their place.
warnings.simplefilter("ignore", DeprecationWarning)


class Person(BaseModel):
    """Somebody who is named."""

    # A small model goes on and on with keys of its own, where the schema leaves room for more.
    model_config = {"extra": "forbid"}

    name: str = Field(min_length=1, max_length=20)
    age: int = Field(ge=0, le=150)
    tags: list[Annotated[str, Field(max_length=8)]] = Field(max_length=2)


class Anything(BaseModel):
    """What any object of JSON is."""

    model_config = {"extra": "allow"}


# Modes whose answers have to follow the schema; in the others a model is asked to, and may not.
SCHEMA = [Mode.TOOLS, Mode.TOOLS_STRICT, Mode.FUNCTIONS, Mode.JSON_SCHEMA, Mode.JSON_O1]
TURNS = [{"role": "user", "content": ASK}]
OPTIONS = {"model": "auto", "messages": TURNS, "max_retries": 0, "temperature": 0, "max_tokens": 300}
OPENAI = OpenAI(base_url=API, api_key="none", max_retries=0)


def client(mode: Mode) -> instructor.Instructor:
    return instructor.from_openai(OPENAI, mode=mode)


@check
def modes_with_a_schema() -> str:
    for mode in SCHEMA:
        person = client(mode).create(response_model=Person, **OPTIONS)
        assert isinstance(person, Person), mode
    return ", ".join(mode.name for mode in SCHEMA)


@check
def mode_json() -> None:
    assert isinstance(client(Mode.JSON).create(response_model=Anything, **OPTIONS), Anything)


@check
def mode_md_json_with_a_grammar_of_ours() -> None:
    follow = {"structured_outputs": {"json": Person.model_json_schema()}}
    person = client(Mode.MD_JSON).create(response_model=Person, extra_body=follow, **OPTIONS)
    assert isinstance(person, Person)


@check
def mode_responses_tools() -> None:
    options = {key: value for key, value in OPTIONS.items() if key != "max_tokens"}
    person = client(Mode.RESPONSES_TOOLS).create(response_model=Person, max_output_tokens=300, **options)
    assert isinstance(person, Person)


@check
def mode_parallel_tools() -> None:
    # It leaves the model free to call nothing, of which a small one makes use.
    must = {"tool_choice": "required", "parallel_tool_calls": False}
    parallel = client(Mode.PARALLEL_TOOLS)
    people = list(parallel.create(response_model=Iterable[Person], extra_body=must, **OPTIONS))
    assert people
    assert all(isinstance(person, Person) for person in people)


@check
def the_completion_is_beside_what_was_read() -> None:
    person, completion = client(Mode.TOOLS).create_with_completion(response_model=Person, **OPTIONS)
    [call] = completion.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == person.model_dump()
    assert completion.loramux["route"]


@check
def partial_objects_of_a_stream() -> None:
    for mode in (Mode.TOOLS, Mode.JSON_SCHEMA):
        *_, last = client(mode).create_partial(response_model=Person, **OPTIONS)
        assert Person.model_validate(last.model_dump()), mode


@check
def asynchronous() -> None:
    async def asked() -> Person:
        opened = AsyncOpenAI(base_url=API, api_key="none", max_retries=0)
        return await instructor.from_openai(opened, mode=Mode.TOOLS).create(response_model=Person, **OPTIONS)

    assert isinstance(asyncio.run(asked()), Person)


finished()
