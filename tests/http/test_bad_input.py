"""Every bad request is a 4xx with an OpenAI error that names the field, and the server goes on."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.http.serving import BASE, TOKENIZER, Served, serving

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(
        tmp_path_factory.mktemp("pool"), limits={"max_body_bytes": 200_000, "max_top_logprobs": 5}
    ) as running:
        yield running
        assert running.chat("still here").choices[0].message.content == "Hello, world."


def checked(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    (error,) = answer.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    result: dict[str, Any] = error
    return result


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1, 2]", "object"),
        (b'"text"', "object"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b'{"model": "auto", "messages": [{"role": "user", "content": "\xc3("}]}', "not UTF-8"),
        (b'{"model": "auto", "temperature": NaN}', "NaN"),
        (b'{"model": "auto", "temperature": Infinity}', "Infinity"),
        (b'{"model": "auto", "seed": 1e999}', "out of range"),
        (b'{"model": "auto", "seed": ' + b"1" * 5000 + b"}", "too long"),
        (b'{"model": ' + b"[" * 90_000, "deep"),
        (rb'{"model": "auto", "prompt": "\ud800", "messages": []}', "surrogate"),
        (rb'{"\uDC00": 1}', "surrogate"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/v1/route", "/tokenize", "/detokenize"])
def test_bodies_that_are_not_json(served: Served, path: str, body: bytes, message: str) -> None:
    error = checked(served.http.post(path, content=body), 400)
    assert message in error["message"]
    assert error["code"] == "invalid_json"


def test_a_body_over_the_limit_is_413_declared_or_not(served: Served) -> None:
    checked(served.http.post(CHAT, content=b" " * 200_001), 413)
    pieces = (b" " * 50_000 for _ in range(5))
    checked(served.http.post(CHAT, content=pieces), 413)


BAD_CHAT: list[tuple[dict[str, Any], str]] = [
    ({"model": 3}, "model"),
    ({"model": ""}, "model"),
    ({"model": "x" * 300}, "model"),
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [*MESSAGES, {"role": "tool", "content": "x"}]}, "messages[1].tool_call_id"),
    ({"messages": [{"role": "user", "content": "x", "name": ""}]}, "messages[0].name"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    (
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
        "messages[0].tool_calls[0].id",
    ),
    ({"store": True}, "store"),
    ({"best_of": 2}, "best_of"),
    ({"metadata": "x"}, "metadata"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"routing": {"strategy": "arrow", "temperature": 1e-46}}, "routing.temperature"),
    ({"routing": {"strategy": "spectr", "merge": "svd"}}, "routing.merge"),
    ({"routing": {"strategy": "logo", "temperature": 1.0}}, "routing.temperature"),
    ({"routing": {"strategy": "hybrid", "signal": "norm"}}, "routing.signal"),
    ({"routing": {"signal": "norm"}}, "routing.signal"),
    ({"routing": {"strategy": "logo", "signal": "x"}}, "routing.signal"),
    ({"routing": {"temperature": 1e-46}}, "routing.temperature"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "the end " * 5_000}]}, "messages"),
    ({"messages": MESSAGES * 2000}, "messages"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 1e300}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 2.5}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"seed": 2**63}, "seed"),
    ({"seed": -(2**63) - 1}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 10**9}, "max_tokens"),
    ({"max_tokens": 2**200}, "max_tokens"),
    ({"max_tokens": 10, "max_completion_tokens": 10}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"n": 0}, "n"),
    ({"n": -1}, "n"),
    ({"n": 10_000}, "n"),
    ({"stop": ["a"] * 20_000}, "stop"),
    ({"stop": "x" * 10_000}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stop": {}}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"stop_token_ids": [10**6]}, "stop_token_ids"),
    ({"stop_token_ids": [1] * 100}, "stop_token_ids"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"5": "1"}}, "logit_bias"),
    ({"logit_bias": {"-5": 1}}, "logit_bias"),
    ({"logit_bias": {"five": 1}}, "logit_bias"),
    ({"logit_bias": {"99999999": 1}}, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"logprobs": 2}, "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 6}, "top_logprobs"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_everything": True}}, "stream_options.include_everything"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"functions": [{}]}, "functions"),
    ({"best_of": 2}, "best_of"),
    ({"temprature": 1}, "temprature"),
    ({"x" * 5_000: 1}, "x" * 100),
    ({"user": "u" * 1000}, "user"),
    ({"lora": []}, "lora"),
    ({"lora": [{"id": "nobody"}]}, "lora[0].id"),
    ({"lora": [{"id": "math", "scale": 1e6}]}, "lora[0].scale"),
    ({"lora": [{"id": "math", "weight": 1}]}, "lora[0].weight"),
    ({"lora": [{"id": "math"}, {"id": "math"}]}, "lora"),
    ({"lora": [{"id": "math"}] * 100}, "lora"),
    ({"lora": [{"id": "math"}], "routing": {}}, "routing"),
    ({"lora": [{"id": "math"}], "model": "law"}, "lora"),
    ({"routing": {"strategy": "magic"}}, "routing.strategy"),
    ({"routing": {"top_m": 0}}, "routing.top_m"),
    ({"routing": {"top_m": 1000}}, "routing.top_m"),
    ({"routing": {"threshold": 500}}, "routing.threshold"),
    ({"routing": {"topm": 2}}, "routing.topm"),
    ({"routing": {"merge": "mix"}}, "routing.merge"),
    ({"routing": {"merge": ""}}, "routing.merge"),
    ({"routing": {}, "model": "law"}, "routing"),
]


@pytest.mark.parametrize(
    ("change", "param"), BAD_CHAT, ids=lambda value: str(value)[:40].encode("ascii", "replace").decode()
)
def test_chat_fields(served: Served, change: dict[str, Any], param: str) -> None:
    body = json.dumps({"model": "auto", "messages": MESSAGES, **change})
    expected = 404 if param == "lora[0].id" else 400
    error = checked(served.http.post(CHAT, content=body.encode()), expected)
    assert error["param"] == param
    assert len(error["message"]) < 1000
    assert param in error["message"] or expected == 404


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [""]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": [[1], [10**20]]}, "prompt"),
        ({"prompt": ["a"] * 50}, "prompt"),
        ({"prompt": ["a"] * 16, "n": 16}, "n"),
        ({"prompt": "the end " * 5_000}, "prompt"),
        ({"prompt": "a" * 500, "max_tokens": 100}, "max_tokens"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"suffix": "b"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"echo": "yes"}, "echo"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_completion_fields(served: Served, change: dict[str, Any], param: str) -> None:
    error = checked(served.http.post(COMPLETIONS, json={"model": "auto", "prompt": "a", **change}), 400)
    assert error["param"] == param


def test_missing_fields_are_named(served: Served) -> None:
    assert checked(served.http.post(CHAT, json={"messages": MESSAGES}), 400)["param"] == "model"
    assert checked(served.http.post(CHAT, json={"model": "auto"}), 400)["param"] == "messages"
    assert checked(served.http.post(COMPLETIONS, json={"model": "auto"}), 400)["param"] == "prompt"


def test_the_context_error_has_the_numbers(served: Served) -> None:
    tokens = len(TOKENIZER("the end " * 110)["input_ids"])
    error = checked(served.http.post(COMPLETIONS, json={"model": BASE, "prompt": "the end " * 110}), 400)
    assert str(tokens) in error["message"]
    assert "512" in error["message"]
    assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("model", ["nobody", "MATH", "math ", "../math", "m\u0000ath", "ма"])
def test_unknown_models_are_404_and_never_the_base(served: Served, model: str) -> None:
    for path, rest in ((CHAT, {"messages": MESSAGES}), (COMPLETIONS, {"prompt": "a"})):
        error = checked(served.http.post(path, json={"model": model, **rest}), 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": "a", "messages": MESSAGES}, "input"),
        ({"input": ""}, "input"),
        ({"input": "a", "model": "math"}, "model"),
        ({"input": "a", "routing": {"policy": "x"}}, "routing.policy"),
    ],
)
def test_route_fields(served: Served, body: dict[str, Any], param: str) -> None:
    assert checked(served.http.post("/v1/route", json=body), 400)["param"] == param


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_tokenize_fields(served: Served, path: str, body: dict[str, Any], param: str) -> None:
    assert checked(served.http.post(path, json=body), 400)["param"] == param


def test_unknown_routes_and_methods_are_openai_errors(served: Served) -> None:
    assert checked(served.http.get("/v1/nothing"), 404)["code"] == "unknown_route"
    assert checked(served.http.get("/v1/models/nobody"), 404)["code"] == "model_not_found"
    answer = served.http.get(CHAT)
    assert checked(answer, 405)["code"] == "method_not_allowed"
    assert answer.headers["allow"] == "POST"
    assert checked(served.http.post("/v1/chat/completions/"), 400)["code"] == "invalid_json"
    checked(served.http.get("/redoc"), 404)


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=20)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = [
    "model", "messages", "prompt", "n", "stop", "seed", "logit_bias", "max_tokens", "temperature",
    "top_p", "top_k", "stream", "stream_options", "logprobs", "top_logprobs", "lora", "routing",
    "echo", "user", "response_format", "stop_token_ids", "input", "tokens", "min_p", "tools",
    "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
]  # fmt: skip
names = st.sampled_from(FIELDS)
paths = st.sampled_from([CHAT, COMPLETIONS, "/v1/route", "/tokenize", "/detokenize"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=paths, changes=st.dictionaries(names, values, max_size=4))
def test_no_body_makes_the_server_fail(served: Served, path: str, changes: dict[str, Any]) -> None:
    valid: dict[str, dict[str, Any]] = {
        CHAT: {"model": "auto", "messages": MESSAGES, "max_tokens": 3},
        COMPLETIONS: {"model": "auto", "prompt": "a", "max_tokens": 3},
        "/v1/route": {"input": "a"},
        "/tokenize": {"prompt": "a"},
        "/detokenize": {"tokens": [1]},
    }
    body = json.dumps({**valid[path], **changes})
    answer = served.http.post(path, content=body.encode())
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        checked(answer, answer.status_code)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=paths, body=st.binary(max_size=200))
def test_no_bytes_make_the_server_fail(served: Served, path: str, body: bytes) -> None:
    assert 400 <= served.http.post(path, content=body).status_code < 500
