"""Answers that follow a schema, an expression, a choice or a grammar, from the real engine over HTTP."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.http.live import ARROW, BLEND, SPECTR, Live, live
from tests.http.serving import BASE, TOKENIZER
from tests.json_types import TYPES, read, schema

MESSAGES = [{"role": "user", "content": "the code of law and math"}]
# A random model does not know where to stop: not between the tokens of JSON either.
COMPACT = {"logit_bias": {str(TOKENIZER(blank)["input_ids"][0]): -100 for blank in " \n\r\t"}}
MODELS: dict[str, dict[str, Any]] = {
    "base": {"model": BASE},
    "routed": {"model": "auto"},
    "blend": BLEND,
    "mixlora": {"model": "mix"},
    "mola": {"model": "mola"},
    "arrow": ARROW,
    "spectr": SPECTR,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(tmp_path_factory.mktemp("adapters"), limits={"max_grammar_bytes": 4096}) as running:
        yield running


def asked(server: Live, path: str = "chat/completions", **fields: Any) -> httpx.Response:
    prompt = {"messages": MESSAGES} if path.startswith("chat") else {"prompt": "the code"}
    return server.http.post(f"/v1/{path}", json={"model": "auto", "seed": 7, **prompt, **fields})


def answered(server: Live, **fields: Any) -> tuple[str, str]:
    """Text and reason of one chat answer."""
    answer = asked(server, **fields)
    assert answer.status_code == 200, answer.text
    [choice] = answer.json()["choices"]
    return choice["message"]["content"], choice["finish_reason"]


def streamed(server: Live, **fields: Any) -> tuple[str, str]:
    """The same, of a stream."""
    text, reasons = "", []
    answer = asked(server, stream=True, **fields)
    assert answer.status_code == 200, answer.text
    for line in answer.text.splitlines():
        if line.startswith("data: {"):
            [choice] = json.loads(line.removeprefix("data: "))["choices"]
            text += choice["delta"].get("content") or ""
            reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
    [reason] = reasons
    return text, reason


def json_schema(name: str) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema(name)}}


@pytest.mark.parametrize("name", TYPES)
def test_an_answer_is_of_the_type_whose_schema_was_asked_for_streamed_and_whole(
    server: Live, name: str
) -> None:
    number = list(TYPES).index(name)
    model = list(MODELS.values())[number % len(MODELS)]
    fields = {**model, "temperature": number % 3 * 0.7, "response_format": json_schema(name), **COMPACT}
    text, reason = answered(server, **fields)
    assert reason == "stop", text
    read(name, text)
    assert streamed(server, **fields) == (text, reason)


def test_sixteen_of_them_in_one_batch_say_what_they_say_alone(server: Live) -> None:
    kinds = list(MODELS.values())
    jobs = [
        {**kinds[n % len(kinds)], "seed": n, "response_format": json_schema(name), **COMPACT} if n % 4 else
        {**kinds[n % len(kinds)], "seed": n, "max_tokens": 16}
        for n, name in enumerate([*TYPES][:16])
    ]  # fmt: skip
    alone = [answered(server, **job) for job in jobs]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda job: answered(server, **job), jobs))
    assert together == alone
    for job, name, (text, _) in zip(jobs, TYPES, together, strict=False):
        if "response_format" in job:
            read(name, text)


def test_json_object_is_any_object(server: Live) -> None:
    # A model that says nothing sensible does not close its texts: without them the object ends.
    bias = {**COMPACT["logit_bias"], str(TOKENIZER('"')["input_ids"][0]): -100}
    found = [
        answered(server, response_format={"type": "json_object"}, seed=n, logit_bias=bias, max_tokens=100)
        for n in range(3)
    ]
    for text, reason in found:
        assert text.startswith("{")
        if reason == "stop":
            assert isinstance(json.loads(text), dict)
    assert any(reason == "stop" for _, reason in found)


def test_the_prompt_is_what_it_is_without_a_structure(server: Live) -> None:
    plain, structured = (
        asked(server, max_tokens=3, **more).json()["usage"]["prompt_tokens"]
        for more in ({}, {"response_format": {"type": "json_object"}})
    )
    assert plain == structured


@pytest.mark.parametrize("form", ["guided_{}", "structured_outputs"])
@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        ("regex", r"[a-f]{3}-(x|yy)\d", r"[a-f]{3}-(x|yy)\d"),
        ("choice", ["positive", "negative", 'so "so"', "好"], 'positive|negative|so "so"|好'),
        ("grammar", 'start: "a" NUM ";" | "b"\nNUM: /[0-9]{2}/', r"a[0-9]{2};|b"),
        ("grammar", 'root ::= "x" tail\ntail ::= [0-4] "!" | "?"', r"x([0-4]!|\?)"),
        ("json", {"enum": ["on", "off"]}, '"on"|"off"'),
        ("json", json.dumps({"type": "boolean"}), "true|false"),
    ],
)
def test_a_structure_in_vllms_words(server: Live, form: str, kind: str, given: Any, expected: str) -> None:
    field = {form.format(kind): given} if "{}" in form else {form: {kind: given}}
    for seed in range(4):
        text, reason = answered(server, **field, seed=seed, temperature=1.5)
        assert re.fullmatch(expected, text), text
        assert reason == "stop"
        answer = asked(server, "completions", **field, seed=seed, max_tokens=20, n=2, temperature=1.5)
        for choice in answer.json()["choices"]:
            assert re.fullmatch(expected, choice["text"])
            assert choice["finish_reason"] == "stop"


def test_structured_outputs_json_object(server: Live) -> None:
    text, _ = answered(server, structured_outputs={"json_object": True}, max_tokens=30)
    assert text.startswith("{")


def test_it_goes_with_every_other_option(server: Live) -> None:
    fields: dict[str, Any] = {
        "guided_regex": "(ab|cd){6}z",
        "temperature": 1.3,
        "top_p": 0.9,
        "min_p": 0.001,
        "frequency_penalty": 1.0,
        "repetition_penalty": 1.2,
        "logit_bias": {"5": 100},
        "logprobs": True,
        "top_logprobs": 2,
        "n": 3,
        "ignore_eos": True,
    }
    answer = asked(server, **fields).json()
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert all(re.fullmatch("(ab|cd){6}z", text) for text in texts)
    assert len(set(texts)) > 1  # of 64 that it may be
    for choice in answer["choices"]:
        entries = choice["logprobs"]["content"]
        assert "".join(entry["token"] for entry in entries) == choice["message"]["content"]
        # They are the model's, which never wanted to say this.
        assert min(entry["logprob"] for entry in entries) < -3
        assert any(entry["token"] not in [o["token"] for o in entry["top_logprobs"]] for entry in entries)
    assert answer["usage"]["completion_tokens"] == 39


def test_a_stop_string_ends_an_answer_before_its_grammar_does(server: Live) -> None:
    text, reason = answered(server, guided_regex="(ab|cd){6}z", stop=["z", "d"], top_k=3)
    assert (re.fullmatch("(ab)*c|(ab){6}", text) is not None, reason) == (True, "stop")


def test_too_few_tokens_for_the_grammar_end_it_by_length(server: Live) -> None:
    assert answered(server, guided_regex="a{20}", max_tokens=7) == ("a" * 7, "length")
    assert answered(server, guided_regex="a{7}", max_tokens=7) == ("a" * 7, "stop")


OBJECT = {"type": "object"}
UNKNOWN = {"not": {}, "if": {}}
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
    (
        {"response_format": {"type": "json_object", "json_schema": {"name": "x", "schema": OBJECT}}},
        "response_format.json_schema", "only allowed",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": OBJECT}}},
        "response_format.json_schema.name", "must match",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": UNKNOWN}}},
        "response_format.json_schema.schema", "keywords if, not are not supported",
    ),
    ({"guided_json": {"items": {"uniqueItems": True}}}, "guided_json", "uniqueItems"),
    ({"guided_json": {"x-guidance": {"lenient": True}, "not": {}}}, "guided_json", "keywords not"),
    ({"guided_json": {"type": "string", "format": "zip"}}, "guided_json", "Unknown format: zip"),
    ({"guided_json": {"$ref": "https://example.org/x.json"}}, "guided_json", "example.org"),
    ({"guided_json": {"$ref": "#/$defs/none"}}, "guided_json", "/$defs/none"),
    ({"guided_json": {"oneOf": [{"type": "string"}, {"maxLength": 3}]}}, "guided_json", "oneOf"),
    ({"guided_json": "{"}, "guided_json", "is not JSON"),
    ({"guided_json": [1]}, "guided_json", "JSON Schema object"),
    ({"guided_json": {"enum": []}}, "guided_json", "Unsatisfiable"),
    ({"guided_regex": "(a"}, "guided_regex", "unclosed group"),
    ({"guided_regex": "(?=a)b"}, "guided_regex", "look-around"),
    ({"guided_regex": ""}, "guided_regex", "at least 1"),
    ({"guided_regex": "a" * 5000}, "guided_regex", "4096"),
    ({"guided_choice": []}, "guided_choice", "at least 1"),
    ({"guided_choice": ["a", ""]}, "guided_choice[1]", "at least 1"),
    ({"guided_choice": ["a", 3]}, "guided_choice[1]", "string"),
    ({"guided_choice": ["a" * 5000]}, "guided_choice", "4096"),
    ({"guided_grammar": "start: nothing"}, "guided_grammar", "nothing"),
    ({"guided_grammar": 'root ::= ("a"'}, "guided_grammar", "')'"),
    ({"guided_grammar": "root ::= " + "(" * 1500}, "guided_grammar", "recursion"),
    ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp", "unknown field"),
    ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "combined with guided_regex"),
    (
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        "structured_outputs.regex", "combined with response_format",
    ),
]  # fmt: skip


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
@pytest.mark.parametrize(("fields", "param", "words"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_cannot_be_followed_is_refused_by_name(
    server: Live, path: str, fields: dict[str, Any], param: str, words: str
) -> None:
    body = {"model": "auto"} | ({"messages": MESSAGES} if "chat" in path else {"prompt": "the code"})
    answer = server.http.post(f"/v1/{path}", json={**body, **fields})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert words in error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 500


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "text"}},
        {"response_format": None, "structured_outputs": None, "guided_json": None, "guided_choice": None},
    ],
)
def test_text_is_no_structure(server: Live, fields: dict[str, Any]) -> None:
    assert answered(server, max_tokens=5, **fields) == answered(server, max_tokens=5)
