"""The table from any exception to an OpenAI error: nothing else decides a status."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from loramux.adapters.errors import AdapterError, BlendError
from loramux.router.errors import RouterError, RoutingExamplesError, RoutingOptionsError
from loramux.server.backend.errors import BackendDown, BackendError
from loramux.server.engine.protocol import (
    EngineClosed,
    EngineError,
    EngineExhausted,
    EngineOverloaded,
    GrammarError,
)
from loramux.server.errors import INVALID, SERVER, NotReady, RequestError


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """An OpenAI error, ready to send."""

    status: int
    message: str
    kind: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, object]:
        """`{"error": {"message", "type", "param", "code"}}`."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def encode(self) -> bytes:
        """ASCII JSON: a message may quote a client's lone surrogate, which UTF-8 cannot carry."""
        return json.dumps(self.body()).encode("ascii")


@dataclass(frozen=True, slots=True)
class _Row:
    error: type[Exception]
    status: int
    kind: str
    code: str
    param: str | None = None


# First match wins, so a subclass stands before its base.
ERROR_TABLE: tuple[_Row, ...] = (
    _Row(NotReady, 503, SERVER, "not_ready"),
    _Row(EngineOverloaded, 429, "rate_limit_error", "queue_full"),
    _Row(EngineClosed, 503, SERVER, "engine_closed"),
    _Row(EngineExhausted, 503, SERVER, "out_of_memory"),
    _Row(GrammarError, 400, INVALID, "grammar_failed"),
    _Row(BackendDown, 503, SERVER, "backend_down"),
    _Row(BackendError, 502, SERVER, "backend_error"),
    _Row(EngineError, 500, SERVER, "engine_error"),
    _Row(BlendError, 400, INVALID, "blend_refused"),
    _Row(AdapterError, 500, SERVER, "adapter_error"),
    _Row(RouterError, 500, SERVER, "router_error"),
)


def describe(error: Exception) -> ErrorAnswer:
    """The answer for `error`; what no row knows is a 500 that gives nothing of the inside away."""
    if isinstance(error, RequestError):
        headers = {"WWW-Authenticate": "Bearer"} if error.status == HTTPStatus.UNAUTHORIZED else {}
        return ErrorAnswer(error.status, str(error), error.kind, error.param, error.code, headers)
    if isinstance(error, RoutingOptionsError):
        return ErrorAnswer(400, str(error), INVALID, f"routing.{error.option}", "invalid_value")
    if isinstance(error, RoutingExamplesError):
        param = "routing_examples" if error.number is None else f"routing_examples[{error.number}]"
        return ErrorAnswer(400, str(error), INVALID, param, "examples_refused")
    for row in ERROR_TABLE:
        if isinstance(error, row.error):
            retry = getattr(error, "retry_after", None)
            headers = {} if retry is None else {"Retry-After": str(retry)}
            return ErrorAnswer(row.status, str(error), row.kind, row.param, row.code, headers)
    return ErrorAnswer(500, "internal error; the server's log has the details", SERVER, code="internal_error")


async def send_error(answer: ErrorAnswer, scope: Scope, receive: Receive, send: Send) -> None:
    """Send an error as a whole response."""
    await error_response(answer)(scope, receive, send)


def error_response(answer: ErrorAnswer) -> Response:
    """The response of an error."""
    return Response(
        answer.encode(),
        status_code=answer.status,
        headers=dict(answer.headers),
        media_type="application/json",
    )
