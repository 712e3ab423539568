"""A request's id, its line in the log and its place in the HTTP metrics."""

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loramux.server.edge.failures import describe, send_error
from loramux.server.metrics import Metrics
from loramux.server.traces import Traces

log = logging.getLogger("loramux")

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
CLIENT_CLOSED = 499


class Trace:
    """ASGI middleware, the outermost. A client's `x-request-id` is kept when it is harmless."""

    def __init__(self, app: ASGIApp, metrics: Metrics, traces: Traces) -> None:
        self._app = app
        self._metrics = metrics
        self._traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # The door makes a HEAD into a GET.
        request_id, method = _request_id(scope), scope["method"]
        status = CLIENT_CLOSED
        started = time.monotonic()

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            with self._traces.continued(Headers(scope=scope), request_id):
                await self._app(scope, receive, tagged)
        except ClientDisconnect:
            log.debug("%s: the client left while it sent its body", request_id)
        except Exception as error:
            # The outermost place: whatever no handler knows ends here, logged, and the server goes on.
            log.exception("%s failed", request_id)
            if status != CLIENT_CLOSED:
                raise
            await send_error(describe(error), scope, receive, tagged)
        finally:
            seconds = time.monotonic() - started
            route = getattr(scope.get("route"), "path", "unmatched")
            self._metrics.answered(method, route, status, seconds)
            log.debug("%s %s %s %d %.3fs", request_id, method, route, status, seconds)


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get("x-request-id", "")
    if REQUEST_ID.fullmatch(given):
        return given
    return f"req-{uuid.uuid4().hex}"
