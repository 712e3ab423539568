"""The document at `/openapi.json`: requests from the models that parse them, answers from their types."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from pydantic import TypeAdapter

from loramux.server.wire import answers, response_answers
from loramux.server.wire.admin import LoadAdapterRequest, UnloadAdapterRequest
from loramux.server.wire.chat import ChatRequest
from loramux.server.wire.completions import CompletionRequest
from loramux.server.wire.embeddings import EmbeddingsRequest
from loramux.server.wire.replicas import Drained, DrainReplicaRequest, ReplicaList
from loramux.server.wire.responses import ResponseRequest
from loramux.server.wire.route import RouteRequest
from loramux.server.wire.strict import StrictModel
from loramux.server.wire.tokenize import DetokenizeRequest, TokenizeRequest

PATH, DOCS = "/openapi.json", "/docs"
_REFERENCE = "#/components/schemas/{model}"
_JSON, _EVENTS = "application/json", "text/event-stream"
#: What any route with a body may answer beside its own.
_OF_BODIES = (400, 401, 408, 413, 415, 500, 503)
_KEYED = (401, 500)


@dataclass(frozen=True, slots=True)
class Operation:
    """One route.

    Attributes:
        summary: one line for people.
        answer: the type of its JSON, or the media type of what else it sends.
        request: the model of its body.
        example: a body.
        chunk: the type of one event, where it streams too.
        errors: the statuses it may fail with.
        admin: whether it needs the admin key.
        open: whether it needs no key at all.
    """

    summary: str
    answer: Any
    request: type[StrictModel] | None = None
    example: Mapping[str, Any] = field(default_factory=dict)
    chunk: Any = None
    errors: Sequence[int] = _KEYED
    admin: bool = False
    open: bool = False


_ASK = [{"role": "user", "content": "Find all .txt files changed in the last two days"}]
_GENERATING = (*_OF_BODIES, 404, 429)
OPERATIONS: Mapping[tuple[str, str], Operation] = {
    ("post", "/v1/chat/completions"): Operation(
        "Chat, streamed or whole",
        answers.ChatCompletion,
        ChatRequest,
        {"model": "auto", "messages": _ASK, "max_tokens": 40, "temperature": 0},
        chunk=answers.ChatCompletionChunk,
        errors=_GENERATING,
    ),
    ("post", "/v1/completions"): Operation(
        "Completions, streamed or whole, with `echo`",
        answers.Completion,
        CompletionRequest,
        {"model": "auto", "prompt": "The capital of France is", "max_tokens": 8},
        chunk=answers.Completion,
        errors=_GENERATING,
    ),
    ("post", "/v1/embeddings"): Operation(
        "Vectors of the encoder that routes",
        answers.Embeddings,
        EmbeddingsRequest,
        {"model": "auto", "input": ["Why was my card payment declined?"]},
        errors=(*_OF_BODIES, 404),
    ),
    ("post", "/v1/responses"): Operation(
        "A response to a text or a conversation, streamed or whole; nothing is stored",
        response_answers.Response,
        ResponseRequest,
        {"model": "auto", "input": _ASK[0]["content"], "max_output_tokens": 40, "temperature": 0},
        chunk=response_answers.ResponseEvent,
        errors=_GENERATING,
    ),
    ("get", "/v1/models"): Operation("What `model` may be", answers.ModelList),
    ("get", "/v1/models/{model}"): Operation("One model", answers.ModelCard, errors=(*_KEYED, 404)),
    ("get", "/v1/experts"): Operation("What the experts are for and worth; their map", answers.ExpertList),
    ("post", "/v1/route"): Operation(
        "The router's whole decision; nothing is generated",
        answers.Decision,
        RouteRequest,
        {"input": "Why was my card payment declined?"},
        errors=_OF_BODIES,
    ),
    ("post", "/tokenize"): Operation(
        "Text or chat to token ids",
        answers.Tokenized,
        TokenizeRequest,
        {"prompt": "Hello"},
        errors=(*_OF_BODIES, 404),
    ),
    ("post", "/detokenize"): Operation(
        "Token ids to text",
        answers.Detokenized,
        DetokenizeRequest,
        {"tokens": [1, 2, 3]},
        errors=(*_OF_BODIES, 404),
    ),
    ("post", "/v1/load_lora_adapter"): Operation(
        "Load a LoRA or a sparse model while serving",
        answers.Adapter,
        LoadAdapterRequest,
        {"lora_name": "poetry", "lora_path": "poetry", "routing_examples": ["Write a sonnet about rain"]},
        errors=(*_OF_BODIES, 403, 409),
        admin=True,
    ),
    ("post", "/v1/unload_lora_adapter"): Operation(
        "Take one out",
        answers.Unloaded,
        UnloadAdapterRequest,
        {"lora_name": "poetry"},
        errors=(*_OF_BODIES, 403, 404, 409),
        admin=True,
    ),
    ("get", "/v1/lora_adapters"): Operation(
        "What is loaded", answers.AdapterList, errors=(*_KEYED, 403), admin=True
    ),
    ("get", "/v1/replicas"): Operation(
        "The processes that generate", ReplicaList, errors=(*_KEYED, 403), admin=True
    ),
    ("post", "/v1/drain_replica"): Operation(
        "Start one of them again, after its sequences have moved to others",
        Drained,
        DrainReplicaRequest,
        {"replica": 0},
        errors=(*_OF_BODIES, 403, 409),
        admin=True,
    ),
    ("get", "/health"): Operation("Whether the process lives", answers.Status, errors=(503,), open=True),
    ("get", "/ready"): Operation("Whether it takes work", answers.Status, errors=(503,), open=True),
    ("get", "/version"): Operation("The release that serves", answers.Version),
    ("get", "/metrics"): Operation("Metrics for Prometheus", "text/plain", open=True),
    ("get", "/"): Operation("The page", "text/html", errors=(), open=True),
    ("get", PATH): Operation("This document", {"type": "object"}, errors=(), open=True),
    ("get", DOCS): Operation("This document as a page", "text/html", errors=(), open=True),
}


def document(version: str) -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    schemas = _schemas(OPERATIONS.values())
    paths: dict[str, dict[str, Any]] = {}
    for (method, path), operation in OPERATIONS.items():
        paths.setdefault(path, {})[method] = _described(method, path, operation)
    bearer = {"type": "http", "scheme": "bearer"}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "loramux",
            "version": version,
            "description": "An OpenAI-compatible server that chooses LoRA experts by reading the prompt.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"key": bearer, "admin_key": bearer}},
    }


def _schemas(operations: Iterable[Operation]) -> dict[str, Any]:
    """Every model and type by its name."""
    requests = [operation.request for operation in operations if operation.request is not None]
    types = {kind for o in operations for kind in (o.answer, o.chunk) if isinstance(kind, type)}
    adapters = [(model.__name__, "validation", TypeAdapter(model)) for model in requests]
    adapters += [(kind.__name__, "serialization", TypeAdapter(kind)) for kind in {*types, answers.ErrorBody}]
    _, found = TypeAdapter.json_schemas(adapters, ref_template=_REFERENCE)  # type: ignore[arg-type]
    return dict(sorted(found["$defs"].items()))


def _described(method: str, path: str, operation: Operation) -> dict[str, Any]:
    name = path.strip("/").replace("/", "_").replace("{", "").replace("}", "").replace(".", "_") or "page"
    described: dict[str, Any] = {
        "operationId": f"{method}_{name}",
        "summary": operation.summary,
        "responses": {"200": _answer(operation), **{str(s): _error(s) for s in sorted(operation.errors)}},
    }
    if operation.request is not None:
        content = {"schema": _reference(operation.request), "example": dict(operation.example)}
        described["requestBody"] = {"required": True, "content": {_JSON: content}}
    if "{model}" in path:
        described["parameters"] = [
            {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        ]
    if not operation.open:
        # Where no keys are set, none is asked for.
        described["security"] = [{"admin_key": []}] if operation.admin else [{"key": []}, {}]
    return described


def _answer(operation: Operation) -> dict[str, Any]:
    answer = operation.answer
    if isinstance(answer, str):
        return {"description": operation.summary, "content": {answer: {"schema": {"type": "string"}}}}
    content = {_JSON: {"schema": _reference(answer)}}
    if operation.chunk is not None:
        content[_EVENTS] = {"schema": _event(operation.chunk), "x-event-schema": _reference(operation.chunk)}
    return {"description": operation.summary, "content": content}


def _event(chunk: Any) -> dict[str, Any]:
    """One event of a stream: before OpenAPI 3.2 `schema` of this media type is taken to describe each."""
    content = {"contentMediaType": _JSON, "contentSchema": _reference(chunk)}
    data = {"type": "string", "anyOf": [{"const": "[DONE]"}, content]}
    properties = {"event": {"type": "string"}, "data": data}
    return {"type": "object", "properties": properties, "required": ["data"]}


def _error(status: int) -> dict[str, Any]:
    content = {_JSON: {"schema": _reference(answers.ErrorBody)}}
    return {"description": HTTPStatus(status).phrase, "content": content}


def _reference(kind: Any) -> dict[str, Any]:
    return {"$ref": _REFERENCE.format(model=kind.__name__)} if isinstance(kind, type) else dict(kind)
