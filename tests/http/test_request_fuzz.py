"""Random requests near the edges of every field, derived from the wire models: a 4xx that names the field, or
an answer of the right shape; never a 5xx.

`FUZZ_EXAMPLES` sets the number of examples of each property (`make fuzz`), 200 without it.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

from loramux.server.engine.protocol import Work
from loramux.server.wire.chat import ChatRequest
from loramux.server.wire.completions import CompletionRequest
from loramux.server.wire.generation import LoraScale, RoutingFields
from loramux.server.wire.responses import LOGPROBS, ResponseRequest
from loramux.server.wire.route import RouteRequest
from loramux.server.wire.strict import StrictModel
from loramux.server.wire.tokenize import DetokenizeRequest, TokenizeRequest
from tests.http.serving import BASE, EXPERTS, TOKENIZER, Served, serving
from tests.kit import ScriptedEngine
from tests.tiny import Alone

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "200"))
FUZZ = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

MESSAGES = [{"role": "user", "content": "hello math"}]
ROUTES: dict[str, tuple[type[StrictModel], dict[str, Any]]] = {
    "/v1/chat/completions": (ChatRequest, {"model": "auto", "messages": MESSAGES, "max_tokens": 3}),
    "/v1/completions": (CompletionRequest, {"model": "auto", "prompt": "code", "max_tokens": 3}),
    "/v1/responses": (ResponseRequest, {"model": "auto", "input": "math", "max_output_tokens": 3}),
    "/v1/route": (RouteRequest, {"input": "law"}),
    "/tokenize": (TokenizeRequest, {"prompt": "law"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [1]}),
}
# What a float32 does not hold, what JSON readers disagree on, and other JSON types in place of a number.
ODD: list[Any] = [
    0, -0.0, 1, 1.0, True, "1", -1, 0.5, 1e-46, 1e-60, 5e-324, 1.2e-38, 1e38, 1e39, -1e39, 1.7e308,
    2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64, 10**400, -(10**400),
    1e16, 1e22, [], {}, [0], None,
]  # fmt: skip
RAW = ["NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1e-400", "-0", "1E+2", "0x1", "01", "1."]


def sampled(work: Work) -> Sequence[int]:
    """Tokens that the server's own sampler draws, so that a parameter it cannot compute with fails here."""
    sampler = Alone(work.sampling, work.prompt)
    logits = torch.linspace(-30, 30, len(TOKENIZER))[torch.randperm(len(TOKENIZER))]
    tokens = []
    for _ in range(work.sampling.max_tokens):
        score = sampler.sample(logits)
        assert math.isfinite(score.logprob or 0.0)
        sampler.accept(score.id)
        tokens.append(score.id)
    return tokens


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    pool: Path = tmp_path_factory.mktemp("pool")
    with serving(pool, engine=ScriptedEngine(sampled)) as running:
        yield running


def bounds(info: FieldInfo) -> list[Any]:
    """The declared bounds of a field and the numbers next to them."""
    near: list[Any] = []
    for mark in info.metadata:
        for name in ("ge", "gt", "le", "lt"):
            bound = getattr(mark, name, None)
            if isinstance(bound, int | float):
                near += [bound, bound - 1, bound + 1, float(bound)]
                near += [math.nextafter(bound, -math.inf), math.nextafter(bound, math.inf)]
    return near


def numeric(model: type[StrictModel]) -> list[str]:
    """The fields of a model whose type has a number in it, and no object."""
    kinds = {int, float, int | None, float | None}
    return [name for name, info in model.model_fields.items() if info.annotation in kinds]


def places() -> list[tuple[str, tuple[str | int, ...], FieldInfo | None]]:
    """Every numeric field of every route: path of the route, path in the body, declaration."""
    found: list[tuple[str, tuple[str | int, ...], FieldInfo | None]] = []
    for route, (model, _) in ROUTES.items():
        found += [(route, (name,), model.model_fields[name]) for name in numeric(model)]
        if "routing" in model.model_fields:
            found += [
                (route, ("routing", name), RoutingFields.model_fields[name])
                for name in numeric(RoutingFields)
            ]
        if "lora" in model.model_fields:
            found += [(route, ("lora", 0, "scale"), LoraScale.model_fields["scale"])]
            found += [(route, ("logit_bias", "5"), None), (route, ("stop_token_ids", 0), None)]
    return [*found, ("/v1/completions", ("prompt", 0), None), ("/detokenize", ("tokens", 0), None)]


PLACES = places()


def placed(route: str, path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """The valid body of a route with `value` at `path`, and what the field needs beside it."""
    body = dict(ROUTES[route][1])
    match path:
        case (str(name),):
            body[name] = value
            if name == "max_completion_tokens":
                del body["max_tokens"]
            if name == "top_logprobs":
                body |= {"include": [LOGPROBS]} if "responses" in route else {"logprobs": True}
        case ("lora", _, _):
            body["lora"] = [{"id": "math", "scale": value}]
        case (str(name), int()):
            body[name] = [value]
        case (str(name), str(inner)):
            body[name] = {inner: value}
    return body


def posted(served: Served, route: str, body: str) -> httpx.Response:
    return served.http.post(route, content=body.encode(), headers={"content-type": "application/json"})


def check(answer: httpx.Response, route: str, body: dict[str, Any], changed: Sequence[str]) -> None:
    """A 4xx that names one of the changed fields, or an answer of the right shape."""
    assert answer.status_code < 500, (body, answer.text)
    if answer.status_code == 200:
        shaped(answer, route, body)
        return
    assert answer.status_code in (400, 404), (body, answer.text)
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    if error["code"] == "invalid_json":
        return
    told = f"{error['param']} {error['message']}"
    assert any(name in told for name in changed), (changed, error)


def shaped(answer: httpx.Response, route: str, body: dict[str, Any]) -> None:
    if route == "/v1/responses":
        last = answer.text.splitlines()[-2] if body.get("stream") is True else ""
        told = json.loads(last.removeprefix("data: ") or answer.text, parse_constant=refuse)
        told = told.get("response", told)
        assert told["status"] in ("completed", "incomplete"), told
        assert told["usage"]["output_tokens"] >= 0
        return
    if body.get("stream") is True and "completions" in route:
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
        assert lines[-1] == "[DONE]", answer.text
        chunks = [json.loads(line) for line in lines[:-1]]
        assert all("error" not in chunk for chunk in chunks), (body, chunks)
        ends = [choice for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
        assert len(ends) == choices_of(body)
        return
    told = json.loads(answer.text, parse_constant=refuse)
    if route == "/tokenize":
        assert told["count"] == len(told["tokens"])
    elif route == "/detokenize":
        assert isinstance(told["prompt"], str)
    elif route == "/v1/route":
        assert isinstance(told["fallback"], bool)
        assert len(told["candidates"]) == len(EXPERTS)
    else:
        assert len(told["choices"]) == choices_of(body)
        assert told["usage"]["completion_tokens"] >= 0
        assert all(choice["finish_reason"] in ("stop", "length") for choice in told["choices"])


def choices_of(body: dict[str, Any]) -> int:
    """Choices that a valid request asks for: `n` of each prompt, where a list of ids is one prompt."""
    prompt = body.get("prompt")
    many = len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1
    return many * (body.get("n") or 1)


def refuse(name: str) -> None:
    raise AssertionError(f"{name} in an answer")


@pytest.mark.parametrize(
    ("route", "path", "info"), PLACES, ids=[f"{r}:{'.'.join(map(str, p))}" for r, p, _ in PLACES]
)
def test_every_number_in_every_numeric_field(
    served: Served, route: str, path: tuple[str | int, ...], info: FieldInfo | None
) -> None:
    mark = "\u0001here"
    for value in [*ODD, *(bounds(info) if info else ())]:
        body = placed(route, path, value)
        check(posted(served, route, json.dumps(body)), route, body, [str(path[0])])
    for text in RAW:
        raw = json.dumps(placed(route, path, mark)).replace(json.dumps(mark), text)
        check(posted(served, route, raw), route, placed(route, path, None), [str(path[0])])


@pytest.mark.parametrize("path", [path for route, path, _ in PLACES if "chat" in route], ids=str)
@pytest.mark.parametrize("value", [True, "1", [], {}, 10**400, 1e39])
def test_what_is_no_number_of_the_field_is_400(
    served: Served, path: tuple[str | int, ...], value: object
) -> None:
    body = placed("/v1/chat/completions", path, value)
    answer = posted(served, "/v1/chat/completions", json.dumps(body))
    assert answer.status_code == 400, (body, answer.text)
    assert answer.json()["error"]["param"].startswith(str(path[0]))


texts = st.text(max_size=12) | st.sampled_from(
    ["", "\u0000", "\u200b", "<|end|>", "math", "e\u0301", "😀" * 9]
)
scalars = st.none() | st.booleans() | st.sampled_from(ODD) | st.integers() | st.floats() | texts
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
replayed = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["system", "developer", "user", "assistant", "tool", "", None]),
        "content": texts
        | st.none()
        | st.lists(
            st.fixed_dictionaries(
                {},
 optional={"type": st.sampled_from(["text", "image_url", 1]), "text": texts, "cache_control": anything},
            ),
            max_size=2,
        ),
        **{
            name: st.sampled_from([None, [], {}, "", "x", 0, [{}]])
            for name in ("name", "annotations", "refusal", "audio", "function_call", "tool_calls",
                         "reasoning", "reasoning_content", "tool_call_id", "loramux")
        },
    },
)  # fmt: skip
SPECIAL: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from(["auto", BASE, *EXPERTS, "nobody", ""]),
    "messages": st.lists(replayed, max_size=3),
    "lora": st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "id": st.sampled_from([*EXPERTS, "nobody"]),
                "scale": st.sampled_from(ODD) | st.floats(),
            },
        ),
        max_size=3,
    ),
    "routing": st.fixed_dictionaries(
        {},
        optional={
            "strategy": st.sampled_from(
                ["similarity", "classifier", "hybrid", "arrow", "spectr", "logo", "x"]
            ),
            "explain": st.sampled_from([True, False, None, 1, "x"]),
            "policy": st.sampled_from(["proportional", "softmax", "hydra_minmax", None]),
            "merge": st.sampled_from(["exact", "svd", "linear", "ties", "dare_ties", "magnitude_prune", "y"]),
            **{
                name: st.sampled_from([*ODD, *bounds(RoutingFields.model_fields[name])])
                for name in numeric(RoutingFields)
            },
        },
    ),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries(
        {},
        optional={
            name: st.booleans() | st.none()
            for name in ("include_usage", "continuous_usage_stats", "include_obfuscation")
        },
    ),
    "logit_bias": st.dictionaries(
        st.sampled_from(["0", "5", "05", "260", "99999", "-1", "٣", "1e1"]),
        st.sampled_from(ODD) | st.floats(-101, 101),
        max_size=3,
    ),
    "stop": texts | st.lists(texts, max_size=3),
    "input": texts | st.lists(replayed, max_size=3),
    "include": st.lists(st.sampled_from([LOGPROBS, "reasoning.encrypted_content", "x"]), max_size=2),
    "reasoning": st.fixed_dictionaries({}, optional={"effort": st.sampled_from(["none", "low", "x", None])}),
    "metadata": st.dictionaries(texts, texts, max_size=3),
    "prompt": texts | st.lists(st.integers(-1, 300), max_size=4) | st.lists(texts, max_size=2),
    "tokens": st.lists(st.integers(-1, 300), max_size=5),
}


def values(model: type[StrictModel], name: str) -> st.SearchStrategy[Any]:
    """What to put into a field: what belongs there, what is next to its bounds, or anything at all."""
    info = model.model_fields.get(name)
    near = st.sampled_from([*ODD, *(bounds(info) if info else [])])
    special = SPECIAL.get(name)
    return near | anything if special is None else special | special | near | anything


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, dict[str, Any], list[str]]:
    route = draw(st.sampled_from(list(ROUTES)))
    model, valid = ROUTES[route]
    known = sorted({*model.model_fields, *model.UNSUPPORTED})
    changed = draw(st.lists(st.sampled_from(known), min_size=1, max_size=4, unique=True))
    return route, {**valid, **{name: draw(values(model, name)) for name in changed}}, changed


@FUZZ
@given(asked=requests())
def test_any_request_is_answered_or_told_which_field_is_at_fault(
    served: Served, asked: tuple[str, dict[str, Any], list[str]]
) -> None:
    route, body, changed = asked
    answer = posted(served, route, json.dumps(body))
    check(answer, route, body, changed)


def floats(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high) | st.sampled_from([low, high])


VALID: dict[str, st.SearchStrategy[Any]] = {
    "temperature": floats(1e-5, 2) | st.sampled_from([0, -0.0]),
    "top_p": floats(5e-324, 1),
    "top_k": st.sampled_from([-1, 0, 1, 2, 300, 2**31 - 1]),
    "min_p": floats(0, 1) | st.sampled_from([1e-46, -0.0]),
    "presence_penalty": floats(-2, 2),
    "frequency_penalty": floats(-2, 2),
    "repetition_penalty": floats(0.01, 100),
    "seed": st.integers(-(2**63), 2**63 - 1) | st.sampled_from([-(2**63), 2**63 - 1]),
    "logit_bias": st.dictionaries(st.integers(0, 260).map(str), floats(-100, 100), max_size=3),
    "n": st.integers(1, 3),
    "stop": st.none() | st.text(min_size=1, max_size=3),
    "ignore_eos": st.booleans(),
    "model": st.sampled_from(["auto", BASE, *EXPERTS]),
    "stream": st.booleans(),
    "user": st.none() | st.text(max_size=5),
    "best_of": st.just(1),
    "tools": st.sampled_from([None, []]),
    "store": st.sampled_from([None, False]),
    "service_tier": st.sampled_from([None, "auto", "default"]),
    "metadata": st.sampled_from([None, {}, {"a": "b"}]),
}


@FUZZ
@given(route=st.sampled_from(list(ROUTES)[:2]), fields=st.fixed_dictionaries({}, optional=VALID))
def test_valid_requests_are_answered(served: Served, route: str, fields: dict[str, Any]) -> None:
    body = {**ROUTES[route][1], **fields}
    answer = posted(served, route, json.dumps(body))
    assert answer.status_code == 200, (body, answer.text)
    shaped(answer, route, body)
