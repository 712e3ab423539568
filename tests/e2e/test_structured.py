"""Structured output from the demo base: valid however it is asked for."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai import OpenAI

from tests.e2e.conftest import Server
from tests.json_types import TYPES, Person, Segment, read, schema


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with server.openai() as opened:
        yield opened


def asked(name: str, seed: int) -> dict[str, Any]:
    form = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema(name)}}
    question = [{"role": "user", "content": f"Write one {name} as JSON: points of Ferrari in 1998."}]
    return {"model": "auto", "messages": question, "response_format": form, "seed": seed, "temperature": 0.8}


def whole(client: OpenAI, options: dict[str, Any]) -> tuple[str, str]:
    [choice] = client.chat.completions.create(**options).choices
    assert choice.message.content is not None
    return choice.message.content, choice.finish_reason


def streamed(client: OpenAI, options: dict[str, Any]) -> tuple[str, str]:
    choices = [chunk.choices[0] for chunk in client.chat.completions.create(**options, stream=True)]
    return "".join(choice.delta.content or "" for choice in choices), choices[-1].finish_reason or ""


def test_twenty_schemas_at_once_give_valid_json_streamed_and_whole(client: OpenAI) -> None:
    jobs = [(name, asked(name, seed)) for seed, name in enumerate(TYPES)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda job: whole(client, job[1]), jobs))
        streams = list(pool.map(lambda job: streamed(client, job[1]), jobs))
    assert streams == answers
    for (name, _), (text, reason) in zip(jobs, answers, strict=True):
        assert reason == "stop"
        read(name, text)


def test_the_client_parses_an_answer_into_its_own_class(client: OpenAI) -> None:
    question: Any = [{"role": "user", "content": "Who won in 1998? Give the name and the age."}]
    answer = client.chat.completions.parse(
        model="auto", messages=question, response_format=Person, temperature=0, max_tokens=200
    )
    person = answer.choices[0].message.parsed
    assert isinstance(person, Person)
    assert person == Person.model_validate_json(answer.choices[0].message.content or "")
    with client.chat.completions.stream(
        model="auto", messages=question, response_format=Segment, temperature=0
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Segment)
    assert {"content.delta", "content.done", "chunk"} <= set(kinds)


def test_json_object_is_an_object(client: OpenAI) -> None:
    question: Any = [{"role": "user", "content": "Points as JSON"}]
    answer = client.chat.completions.create(
        model="auto", messages=question, response_format={"type": "json_object"}, seed=3, max_tokens=200
    )
    text = answer.choices[0].message.content or ""
    assert text.startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)
