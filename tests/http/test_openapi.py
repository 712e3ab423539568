"""The document at `/openapi.json` says what the server does: every route, every answer."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute
from jsonschema import Draft202012Validator, ValidationError

from loramux.server.app import ROUTE_GROUPS
from loramux.server.openapi import OPERATIONS
from tests.http.serving import BASE, Served, serving, sparse_model

ADMIN = {"authorization": "Bearer admin"}
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
ASK: dict[str, Any] = {"model": "auto", "messages": [{"role": "user", "content": "law math"}]}
PROMPT: dict[str, Any] = {"model": "auto", "prompt": "law math"}

INPUT: dict[str, Any] = {"model": "auto", "input": "law math"}
TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}
TURNS: list[Any] = [
    {"role": "user", "content": [{"type": "input_text", "text": "law"}]},
    {"type": "message", "role": "assistant", "content": "yes", "id": "msg_1", "status": "completed"},
    {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", "id": "fc_1"},
    {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "x"}]},
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("documented")
    for name, kind in (("poetry", "ok"), ("coe", "sparse"), ("broken", "nothing")):
        (folder / "adapters" / name).mkdir(parents=True)
        (folder / "adapters" / name / kind).touch()
    with serving(folder, admin_key="admin", sparse=[sparse_model("mix")]) as running:
        yield running


@pytest.fixture(scope="module")
def document(served: Served) -> dict[str, Any]:
    answer = served.http.get("/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    content: dict[str, Any] = answer.json()
    return content


def check(document: dict[str, Any], schema: dict[str, Any], value: Any) -> None:
    Draft202012Validator({**schema, "components": document["components"]}).validate(value)


def test_every_route_is_in_it_and_nothing_else(served: Served, document: dict[str, Any]) -> None:
    routes = {
        (method.lower(), route.path.replace(":path", ""))
        for group in ROUTE_GROUPS
        for route in group(served.parts).routes
        if isinstance(route, APIRoute)
        for method in route.methods
    }
    described = {(method, path) for path, methods in document["paths"].items() for method in methods}
    assert routes == described == set(OPERATIONS)


def test_it_is_sound(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)
    used = {part.split('"')[0] for part in json.dumps(document).split("#/components/schemas/")[1:]}
    assert used <= set(schemas)
    names = [operation["operationId"] for paths in document["paths"].values() for operation in paths.values()]
    assert len(set(names)) == len(names)


REQUESTS: list[tuple[str, str, dict[str, Any] | None, int]] = [
    ("get", "/v1/models", None, 200),
    ("get", f"/v1/models/{BASE}", None, 200),
    ("get", "/v1/models/mix", None, 200),
    ("get", "/v1/models/nobody", None, 404),
    ("get", "/health", None, 200),
    ("get", "/ready", None, 200),
    ("get", "/version", None, 200),
    ("post", CHAT, ASK, 200),
    ("post", CHAT, {**ASK, "logprobs": True, "top_logprobs": 2, "n": 2, "stop": "x", "store": False}, 200),
    ("post", CHAT, {**ASK, "lora": [{"id": "law", "scale": 0.5}], "temperature": None, "metadata": {}}, 200),
    ("post", CHAT, {**ASK, "routing": {"strategy": "arrow"}}, 200),
    ("post", CHAT, {**ASK, "routing": {"explain": True}}, 200),
    ("post", RESPONSES, {**INPUT, "routing": {"explain": True}}, 200),
    ("post", CHAT, {**ASK, "model": BASE}, 200),
    ("post", CHAT, {**ASK, "model": "nobody"}, 404),
    ("post", COMPLETIONS, {**PROMPT, "echo": True, "logprobs": 1, "max_tokens": 2}, 200),
    ("post", COMPLETIONS, {**PROMPT, "prompt": [[5, 6], "law"]}, 200),
    ("post", RESPONSES, INPUT, 200),
    ("post", RESPONSES, {**INPUT, "input": TURNS, "max_output_tokens": 3, "instructions": "Be kind."}, 200),
    ("post", RESPONSES, {**INPUT, "include": ["message.output_text.logprobs"], "top_logprobs": 2}, 200),
    ("post", RESPONSES, {**INPUT, "metadata": {"a": "b"}, "store": False, "tools": [], "text": {}}, 200),
    ("post", RESPONSES, {**INPUT, "tools": [TOOL], "tool_choice": "none"}, 200),
    ("post", "/v1/route", {"input": "law"}, 200),
    ("post", "/v1/route", {"messages": ASK["messages"], "routing": {"top_m": 1}}, 200),
    ("post", "/tokenize", {"prompt": "the", "return_token_strs": True}, 200),
    ("post", "/detokenize", {"tokens": [5, 6]}, 200),
    ("post", "/v1/load_lora_adapter", {"lora_name": "poetry", "lora_path": "poetry"}, 200),
    ("post", "/v1/load_lora_adapter", {"lora_name": "coe", "lora_path": "coe"}, 200),
    ("post", "/v1/load_lora_adapter", {"lora_name": "coe", "lora_path": "coe"}, 409),
    ("get", "/v1/lora_adapters", None, 200),
    ("post", "/v1/unload_lora_adapter", {"lora_name": "poetry"}, 200),
    ("post", "/v1/unload_lora_adapter", {"lora_name": "nobody"}, 404),
]


def test_requests_and_answers_are_as_it_says(served: Served, document: dict[str, Any]) -> None:
    """In one test, because adapters come and go in it."""
    for method, path, body, status in REQUESTS:
        template = "/v1/models/{model}" if path.startswith("/v1/models/") else path
        operation = document["paths"][template][method]
        if body is not None:
            check(document, operation["requestBody"]["content"]["application/json"]["schema"], body)
        answer = served.http.request(method, path, json=body, headers=ADMIN)
        assert answer.status_code == status, (path, body, answer.text)
        check(
            document,
            operation["responses"][str(status)]["content"]["application/json"]["schema"],
            answer.json(),
        )


@pytest.mark.parametrize(("path", "body"), [(CHAT, ASK), (COMPLETIONS, PROMPT), (RESPONSES, INPUT)])
def test_the_events_of_a_stream_are_as_it_says(
    served: Served, document: dict[str, Any], path: str, body: dict[str, Any]
) -> None:
    asked = {**body, "stream": True}
    if path == RESPONSES:
        asked |= {"include": ["message.output_text.logprobs"]}
    else:
        asked |= {"stream_options": {"include_usage": True}, "n": 2, "logprobs": True if path == CHAT else 1}
    schema = document["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]
    text = served.http.post(path, json=asked).text
    events = [
        dict(line.split(": ", 1) for line in event.splitlines()) for event in text.split("\n\n") if event
    ]
    for event in events:
        check(document, schema["schema"], event)
    lines = [event["data"] for event in events]
    assert len(lines) > 5
    if path != RESPONSES:
        assert lines.pop() == "[DONE]"
    for line in lines:
        check(document, schema["x-event-schema"], json.loads(line))


def test_a_request_that_is_refused_is_not_one_of_it(served: Served, document: dict[str, Any]) -> None:
    schema = document["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    for wrong_input in (
        {"input": []},
        {"input": [{"role": "user"}]},
        {"input": 3},
        {"store": True},
        {"n": 1.5},
    ):
        responses = document["paths"][RESPONSES]["post"]["requestBody"]["content"]["application/json"]
        with pytest.raises(ValidationError):
            check(document, responses["schema"], {**INPUT, **wrong_input})
        assert served.http.post(RESPONSES, json={**INPUT, **wrong_input}).status_code == 400
    wrong = (
        {"stop": 3}, {"temperature": 2.5}, {"store": True}, {"nothing": 1}, {"messages": []}, {"n": 0},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, {"metadata": 7},
    )  # fmt: skip
    for change in wrong:
        body = {**ASK, **change}
        with pytest.raises(ValidationError):
            check(document, schema, body)
        answer = served.http.post(CHAT, json=body)
        assert answer.status_code == 400
        responses = document["paths"][CHAT]["post"]["responses"]
        check(document, responses["400"]["content"]["application/json"]["schema"], answer.json())


@pytest.mark.parametrize(("path", "text"), [("/tokenize", "prompt"), ("/v1/route", "input")])
def test_a_text_or_a_chat_is_said_to_be_one_of_them(
    served: Served, document: dict[str, Any], path: str, text: str
) -> None:
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    chat, words = {"messages": ASK["messages"]}, {text: "law"}
    for body in (chat, words, {**words, "messages": None}, {**chat, text: None}):
        check(document, schema, body)
        assert served.http.post(path, json=body).status_code == 200
    for wrong in ({}, {**chat, **words}, {text: None}, {"messages": None}, {text: None, "messages": None}):
        with pytest.raises(ValidationError):
            check(document, schema, wrong)
        assert served.http.post(path, json=wrong).status_code == 400


def test_the_examples_are_served(served: Served, document: dict[str, Any]) -> None:
    for path in (CHAT, COMPLETIONS, RESPONSES, "/v1/route", "/tokenize", "/detokenize"):
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        check(document, body["schema"], body["example"])
        assert served.http.post(path, json=body["example"]).status_code == 200


def test_the_page_says_the_same_and_asks_nobody(tmp_path: Path) -> None:
    with serving(tmp_path, keys=("secret",)) as served:
        page = served.http.get("/docs")
        assert page.status_code == 200
        assert page.headers["content-security-policy"].startswith("default-src 'none'")
        for path in served.http.get("/openapi.json").json()["paths"]:
            assert path in page.text
        assert "http://" not in page.text
        assert "https://" not in page.text
        assert served.http.get("/v1/models").status_code == 401
