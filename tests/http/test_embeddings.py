"""`/v1/embeddings` gives the router's own vectors, and says what the encoder cannot read."""

import asyncio
import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest

from loramux.router.router import Router
from loramux.router.service import RoutingService
from loramux.router.store import load_router
from tests.http.serving import Served, serving
from tests.http.test_openapi import check
from tests.kit import DEMO_POOL

TEXTS = ["Why was my card payment declined?", "SELECT name FROM users", "hello world"]
PATH = "/v1/embeddings"


@pytest.fixture(scope="module")
def fitted() -> Router:
    return load_router(DEMO_POOL / "router")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, fitted: Router) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("embeddings"), router=RoutingService(fitted)) as running:
        yield running


def test_vectors_are_the_encoders(served: Served, fitted: Router) -> None:
    expected = fitted.encoder.encode(TEXTS).vectors
    for form in ("float", "base64"):
        answer = served.client.embeddings.create(model="auto", input=TEXTS, encoding_format=form)
        rows: list[Any] = [item.embedding for item in answer.data]
        if form == "base64":
            rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
        np.testing.assert_allclose(np.array(rows, np.float32), expected, atol=1e-7)
        assert [item.index for item in answer.data] == [0, 1, 2]
        assert answer.model == fitted.encoder.spec.id
        assert answer.usage.prompt_tokens == sum(fitted.encoder.count(TEXTS)) > 10
    # The client asks for base64 by itself, and takes one text as well.
    one = served.client.embeddings.create(model=fitted.encoder.spec.id, input=TEXTS[0])
    np.testing.assert_allclose(one.data[0].embedding, expected[0], atol=1e-7)


def test_many_texts_are_embedded_in_turns(served: Served, fitted: Router) -> None:
    texts = [f"text number {n} of many" for n in range(100)]
    answer = served.client.embeddings.create(model="auto", input=texts)
    found = np.array([item.embedding for item in answer.data])
    np.testing.assert_allclose(found, fitted.encoder.encode(texts).vectors, atol=1e-6)


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"input": ""}, "input", "invalid_value"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": [1, 2]}, "input", "invalid_value"),
        ({"input": ["a word", "\u200b"]}, "input[1]", "invalid_value"),
        ({"input": "word " * 3000}, "input", "context_length_exceeded"),
        ({"input": ["word"] * 257}, "input", "invalid_value"),
        ({"input": "word", "dimensions": 7}, "dimensions", "invalid_value"),
        ({"input": "word", "encoding_format": "int8"}, "encoding_format", "invalid_value"),
        ({"input": "word", "nothing": 1}, "nothing", "unknown_field"),
    ],
)
def test_what_cannot_be_embedded_is_named(
    served: Served, body: dict[str, Any], param: str, code: str
) -> None:
    answer = served.http.post(PATH, json={"model": "auto", **body})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code), error


def test_another_model_is_not_found(served: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="not served here; served: auto"):
        served.client.embeddings.create(model="text-embedding-3-small", input="word")


def test_the_answer_is_as_the_document_says(served: Served) -> None:
    document = served.http.get("/openapi.json").json()
    operation = document["paths"][PATH]["post"]
    body = operation["requestBody"]["content"]["application/json"]
    check(document, body["schema"], body["example"])
    answer = served.http.post(PATH, json=body["example"])
    check(document, operation["responses"]["200"]["content"]["application/json"]["schema"], answer.json())


def test_decisions_have_their_turn(fitted: Router) -> None:
    async def scenario() -> list[str]:
        service = RoutingService(fitted)
        order: list[str] = []

        async def embed() -> None:
            await service.embed([f"text {n}" for n in range(200)])
            order.append("embedded")

        async def decide() -> None:
            await service.decide("Why was my card payment declined?")
            order.append("decided")

        await asyncio.gather(embed(), decide())
        await service.close()
        return order

    assert asyncio.run(scenario()) == ["decided", "embedded"]
