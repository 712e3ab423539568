"""`/v1/responses` through the real OpenAI client."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from loramux.server.engine.protocol import EngineError
from tests.http.serving import EXPERTS, TOKENIZER, Served, serving
from tests.kit import ScriptedEngine, saying

OPENED = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
]
CLOSED = ["response.output_text.done", "response.content_part.done", "response.output_item.done"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("pool")) as one:
        yield one


def create(served: Served, **fields: Any) -> Any:
    return served.client.responses.create(**{"model": "auto", "input": "math", **fields})


def prompt_of(served: Served) -> str:
    """What the engine was given last."""
    return str(TOKENIZER.decode(served.engine.works[-1].prompt))


def test_a_text(served: Served) -> None:
    answer = create(served, metadata={"run": "7"}, user="ann", store=False, temperature=0, top_p=0.5)
    assert (answer.status, answer.output_text) == ("completed", "Hello, world.")
    assert (answer.object, answer.store, answer.error, answer.incomplete_details) == (
        "response", False, None, None,
    )  # fmt: skip
    assert (answer.metadata, answer.user, answer.temperature, answer.top_p) == ({"run": "7"}, "ann", 0, 0.5)
    (item,) = answer.output
    assert (item.type, item.role, item.status) == ("message", "assistant", "completed")
    same = served.chat("math").usage
    assert (answer.usage.input_tokens, answer.usage.output_tokens, answer.usage.total_tokens) == (
        same.prompt_tokens, same.completion_tokens, same.total_tokens,
    )  # fmt: skip
    assert answer.model_dump()["loramux"]["route"]["experts"][0]["id"] == "math"


def test_it_is_the_chat_of_the_same_messages(served: Served) -> None:
    first = create(served)
    messages: list[Any] = [
        {"role": "user", "content": "math"},
        *first.output,
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"type": "message", "role": "developer", "content": "Be short."},
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "la"}, {"type": "input_text", "text": "w"}],
        },
    ]
    answer = create(served, input=messages, instructions="You are kind.")
    assert answer.model_dump()["loramux"]["route"]["experts"][0]["id"] == "law"
    said = prompt_of(served)
    served.client.chat.completions.create(
        model="auto",
        messages=[
            {"role": "system", "content": "You are kind."},
            {"role": "user", "content": "math"},
            {"role": "assistant", "content": "Hello, world."},
            {"role": "assistant", "content": "No."},
            {"role": "developer", "content": "Be short."},
            {"role": "user", "content": "law"},
        ],
    )
    assert prompt_of(served) == said
    assert answer.instructions == "You are kind."


def test_a_stream_has_openais_sequence(served: Served) -> None:
    raw = served.http.post("/v1/responses", json={"model": "auto", "input": "math", "stream": True}).text
    lines = raw.splitlines()
    named = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert named == [event["type"] for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    deltas = ["response.output_text.delta"] * (len(events) - 8)
    assert named == [*OPENED, *deltas, *CLOSED, "response.completed"]
    assert "".join(event.get("delta", "") for event in events) == "Hello, world."
    assert "[DONE]" not in raw
    assert events[0]["response"]["status"] == "in_progress"
    assert events[0]["response"]["usage"] is None


def test_the_clients_stream_folds_into_the_whole_answer(served: Served) -> None:
    with served.client.responses.stream(model="auto", input="math") as stream:
        texts = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(texts) == final.output_text == "Hello, world."
    whole = create(served)
    assert final.usage == whole.usage
    assert len(texts) > 2
    plain = list(create(served, stream=True, stream_options={"include_obfuscation": False}))
    assert plain[-1].type == "response.completed"
    assert plain[-1].response.output_text == "Hello, world."


def test_an_answer_that_was_cut_is_incomplete(served: Served) -> None:
    answer = create(served, max_output_tokens=3)
    assert (answer.status, answer.output[0].status) == ("incomplete", "incomplete")
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert (answer.usage.output_tokens, answer.max_output_tokens) == (3, 3)
    *_, last = create(served, max_output_tokens=3, stream=True)
    assert last.type == "response.incomplete"
    assert last.response.output_text == answer.output_text != ""


def test_logprobs_are_those_of_chats(served: Served) -> None:
    options: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    scores = create(served, **options).output[0].content[0].logprobs
    chat = served.chat("math", logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert [score.model_dump() for score in scores] == [score.model_dump() for score in chat]
    streamed = [event for event in create(served, **options, stream=True) if "delta" in event.type]
    assert [one.token for event in streamed for one in event.logprobs] == [score.token for score in scores]


def test_extensions_work_as_in_chats(served: Served) -> None:
    lora = [{"id": "code", "scale": 0.5}]
    answer = create(served, extra_body={"lora": lora, "seed": 3, "stop": ["world"], "top_k": 5})
    assert answer.output_text == "Hello, "
    assert answer.model_dump()["loramux"]["route"]["strategy"] == "given"
    sampling = served.engine.works[-1].sampling
    assert (sampling.seed, sampling.top_k) == (3, 5)
    raw = served.client.responses.with_raw_response.create(model="law", input="x")
    assert raw.headers["x-loramux-experts"] == "law=1"


def test_a_format_is_the_grammar_that_chats_have(served: Served) -> None:
    schema = {key: SCHEMA[key] for key in ("name", "strict", "schema")}
    served.chat("math", response_format={"type": "json_schema", "json_schema": schema})
    grammar = served.engine.works[-1].grammar
    answer = create(served, text={"format": SCHEMA})
    assert served.engine.works[-1].grammar == grammar is not None
    assert answer.model_dump()["text"]["format"]["name"] == "point"
    create(served, text={"format": {"type": "json_object"}})
    assert served.engine.works[-1].grammar not in (None, grammar)
    create(served)
    assert served.engine.works[-1].grammar is None


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": False},
        {"service_tier": "auto", "truncation": "disabled", "safety_identifier": "x", "prompt_cache_key": "y"},
        {"text": {"format": {"type": "text"}, "verbosity": "medium"}, "include": []},
        {"reasoning": {"effort": None, "summary": None}, "background": False, "max_tool_calls": None},
        {"reasoning": {"effort": "none"}, "include": ["reasoning.encrypted_content"], "metadata": None},
        {"previous_response_id": None, "conversation": None, "instructions": None, "store": None},
    ],
)
def test_fields_that_ask_for_nothing_are_taken(served: Served, fields: dict[str, Any]) -> None:
    assert create(served, **fields).output_text == "Hello, world."


SCHEMA: dict[str, Any] = {
    "type": "json_schema", "name": "point", "strict": True,
    "schema": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
}  # fmt: skip
IMAGE = {"type": "input_image", "image_url": "data:,"}
TOOL = {"type": "function", "name": "f", "parameters": {}, "strict": None}


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"store": True}, "store", "unsupported_field"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "unsupported_field"),
        ({"conversation": "conv_1"}, "conversation", "unsupported_field"),
        ({"background": True}, "background", "unsupported_field"),
        ({"prompt": {"id": "x"}}, "prompt", "unsupported_field"),
        ({"tools": [TOOL]}, "tools", "unsupported_field"),
        ({"max_tokens": 5}, "max_tokens", "unsupported_field"),
        ({"n": 2}, "n", "unsupported_field"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary", "unsupported_field"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort", "unsupported_field"),
        ({"truncation": "auto"}, "truncation", "invalid_value"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "invalid_value"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "invalid_value"),
        ({"text": {"format": {"type": "json_object", "schema": {}}}}, "text.format.schema", "invalid_value"),
        ({"text": {"format": SCHEMA | {"schema": {"type": 3}}}}, "text.format.schema", "invalid_grammar"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_field"),
        ({"text": {"format": SCHEMA}, "guided_regex": "a"}, "guided_regex", "invalid_value"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "invalid_value"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"include": ["everything"]}, "include[0]", "invalid_value"),
        ({"metadata": {"k": "v" * 513}}, "metadata", "invalid_value"),
        ({"input": None}, "input", "invalid_value"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": 3}, "input", "invalid_value"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "invalid_value"),
        ({"input": [{"type": "computer_call", "id": "x"}]}, "input[0]", "invalid_value"),
        ({"input": ["x"]}, "input[0]", "invalid_value"),
        ({"input": [{"role": "user"}]}, "input[0].content", "missing_field"),
        ({"input": [{"role": "user", "content": [IMAGE]}]}, "input[0].content", "invalid_value"),
        ({"input": "word " * 30_000}, "input", "context_length_exceeded"),
        ({"max_output_tokens": 2000}, "max_output_tokens", "context_length_exceeded"),
        ({"nothing": 1}, "nothing", "unknown_field"),
        ({"model": "nobody"}, "model", "model_not_found"),
    ],
)  # fmt: skip
def test_what_is_not_served_is_named(served: Served, fields: dict[str, Any], param: str, code: str) -> None:
    answer = served.http.post("/v1/responses", json={"model": "auto", "input": "math", **fields})
    assert answer.status_code == (404 if code == "model_not_found" else 400)
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, code), error
    if code == "context_length_exceeded":
        assert "maximum context length is" in error["message"]


def test_a_failure_in_the_middle_ends_the_stream_with_its_event(tmp_path: Path) -> None:
    failing = ScriptedEngine(saying(TOKENIZER, "Hello"), fail_after=3, failure=EngineError("step failed"))
    with serving(tmp_path, engine=failing) as served:
        *_, last = create(served, stream=True)
        assert last.type == "response.failed"
        assert (last.response.status, last.response.error.code) == ("failed", "engine_error")
        assert last.response.output_text == "Hel"
        with pytest.raises(openai.InternalServerError, match="step failed"):
            create(served)


def test_leaving_aborts(tmp_path: Path) -> None:
    endless = ScriptedEngine(lambda _: [5] * 400)
    with serving(tmp_path, engine=endless) as served:
        stream = create(served, model=EXPERTS[0], stream=True)
        next(iter(stream))
        served.hold()
        stream.close()
        served.wait_for(lambda: endless.log[-1] == "abort")
