"""What the official clients send back in a conversation, and fields that ask for nothing."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from loramux.server.wire.chat import ChatRequest
from tests.http.serving import TOKENIZER, Served, serving


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("pool")) as one:
        yield one


def test_an_answer_put_back_as_it_came(served: Served) -> None:
    first = served.chat("math").choices[0].message
    for replayed in (first, first.model_dump(), first.model_dump(exclude_none=True)):
        messages: list[Any] = [
            {"role": "user", "content": "math", "name": "ann"},
            replayed,
            {
                "role": "user",
                "content": [{"type": "text", "text": "go on", "cache_control": {"type": "ephemeral"}}],
            },
        ]
        answer = served.client.chat.completions.create(model="auto", messages=messages)
        assert answer.choices[0].message.content == "Hello, world."


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "none"},
        {"metadata": {"run": "7"}, "store": False, "service_tier": "auto"},
        {"parallel_tool_calls": True, "user": "ann", "safety_identifier": "x", "prompt_cache_key": "y"},
        {"extra_body": {"best_of": 1, "modalities": ["text"]}},
        {"stream_options": None, "audio": None, "prediction": None},
    ],
)
def test_fields_that_ask_for_nothing_are_taken(served: Served, fields: dict[str, Any]) -> None:
    assert served.chat("math", **fields).choices[0].message.content == "Hello, world."


def test_usage_in_every_chunk(served: Served) -> None:
    options: dict[str, Any] = {
        "include_usage": True,
        "continuous_usage_stats": True,
        "include_obfuscation": False,
    }
    chunks = list(served.chat("math", stream=True, stream_options=options))
    counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage]
    assert len(counts) == len(chunks)
    assert counts == sorted(counts)
    assert chunks[0].usage.prompt_tokens == chunks[-1].usage.prompt_tokens > 0
    assert counts[-2] == counts[-1] > 2


def test_a_context_overflow_in_the_words_that_frameworks_look_for(served: Served) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        served.chat("word " * 30_000)
    assert caught.value.code == "context_length_exceeded"
    assert "maximum context length is" in str(caught.value)
    assert "prompt is too long" in str(caught.value)


def test_what_a_template_raises_is_the_clients_to_read(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise TypeError("can only concatenate str to str")

    monkeypatch.setattr(type(served.parts.prompts._tokenizer), "apply_chat_template", broken)
    with pytest.raises(openai.BadRequestError, match="TypeError: can only concatenate"):
        served.chat("math")


def test_a_mixture_that_a_client_wrote_is_not_rounded(served: Served) -> None:
    lora = [{"id": "math", "scale": 1 / 3}, {"id": "code", "scale": 0.005}]
    answer = served.chat("math", extra_body={"lora": lora}).model_dump()["loramux"]
    assert [one["weight"] for one in answer["route"]["experts"]] == [1 / 3, 0.005]
    adapter = served.engine.works[-1].adapter
    gate = adapter.slot.gate  # type: ignore[union-attr]
    assert sorted({round(float(one), 6) for one in gate.flatten()}) == [0.005, 0.333333]


@pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {"content": "Well. "}, {}])
def test_a_refusal_put_back_is_what_the_assistant_said(served: Served, content: dict[str, Any]) -> None:
    refused: Any = {"role": "assistant", **content, "refusal": "I would rather not."}
    messages: list[Any] = [{"role": "user", "content": "math"}, refused, {"role": "user", "content": "math"}]
    served.client.chat.completions.create(model="auto", messages=messages)
    said = TOKENIZER.decode(served.engine.works[-1].prompt)
    expected = f"Well. \n{refused['refusal']}" if content.get("content") else refused["refusal"]
    assert f"<|assistant|>{expected}<|end|>" in said


def test_who_else_refuses_is_told_so(served: Served) -> None:
    messages: Any = [{"role": "user", "content": "math", "refusal": "No."}]
    with pytest.raises(openai.BadRequestError) as caught:
        served.client.chat.completions.create(model="auto", messages=messages)
    assert caught.value.param == "messages[0].refusal"


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "functions": [], "tool_choice": "none", "parallel_tool_calls": False},
        {"response_format": {"type": "text"}, "modalities": ["text"], "metadata": {}},
        dict.fromkeys(sorted(ChatRequest.UNSUPPORTED)),
    ],
    ids=["tools", "defaults", "nulls"],
)
def test_completions_take_what_asks_for_nothing_as_chats_do(served: Served, fields: dict[str, Any]) -> None:
    answer = served.http.post("/v1/completions", json={"model": "auto", "prompt": "a", **fields})
    assert answer.status_code == 200, answer.text


def test_an_overflow_names_the_field_that_asked_for_too_much(served: Served) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        with pytest.raises(openai.BadRequestError) as caught:
            served.chat("math", **{name: 2000})
        assert caught.value.param == name
        assert caught.value.code == "context_length_exceeded"
        assert "maximum context length is" in str(caught.value)
        assert "prompt is too long" in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.x.y }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_that_fails_has_its_code(
    served: Served, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    monkeypatch.setattr(served.parts.prompts._tokenizer, "chat_template", template)
    with pytest.raises(openai.BadRequestError, match="the chat template") as caught:
        served.chat("math")
    assert (caught.value.code, caught.value.param) == ("template_error", "messages")
