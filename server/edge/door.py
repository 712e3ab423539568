"""What is decided about a request before anything reads it: path, host, media type, time."""

import asyncio
import re
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loramux.server.edge.failures import describe, send_error
from loramux.server.errors import Forbidden, RequestError, RequestTimeout, UnsupportedMedia

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_SLASHES = re.compile("/{2,}")


class Door:
    """ASGI middleware between the trace and the keys.

    Doubled and trailing slashes mean nothing. HEAD is GET without the body. A body is JSON and says so: a
    page of another origin can post `text/plain` without being asked first, and would start work. A server on
    loopback answers to loopback's names only, or a page could reach it through a name of its own.
    """

    def __init__(
        self, app: ASGIApp, *, host: str, allowed_hosts: Sequence[str] = (), body_seconds: float = 60.0
    ) -> None:
        self._app = app
        self._hosts = LOOPBACK | {name.lower() for name in allowed_hosts} if host in LOOPBACK else None
        self._body_seconds = body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # In place: the trace reads the matched route off the same scope.
        scope["path"] = _SLASHES.sub("/", scope["path"]).rstrip("/") or "/"
        if scope["method"] == "HEAD":
            scope["method"], send = "GET", _without_body(send)
        try:
            self._check(Headers(scope=scope), scope["method"])
        except RequestError as error:
            await send_error(describe(error), scope, receive, send)
            return
        await self._app(scope, self._timed(receive), send)

    def _check(self, headers: Headers, method: str) -> None:
        # Browsers always send a host; an HTTP/1.0 probe has none, and is no page.
        name = _host_name(headers.get("host", ""))
        if self._hosts is not None and name and name not in self._hosts:
            raise Forbidden(
                f"host {name[:100]!r} is not served; the setting allowed_hosts names more",
                code="host_refused",
            )
        if method != "POST":
            return
        encoding = headers.get("content-encoding", "identity").lower()
        if encoding not in ("", "identity"):
            raise UnsupportedMedia(
                f"Content-Encoding {encoding[:50]!r} is not supported; send the body as it is",
                code="unsupported_encoding",
            )
        kind = headers.get("content-type")
        if kind is None and "origin" not in headers:
            return
        media = (kind or "").partition(";")[0].strip().lower()
        if media != "application/json" and not media.endswith("+json"):
            raise UnsupportedMedia(
                f"Content-Type {media[:50]!r} is not supported; send application/json",
                code="unsupported_type",
            )

    def _timed(self, receive: Receive) -> Receive:
        """`receive` for a body that has to be there in time; a disconnect after it may come when it likes."""
        deadline = asyncio.get_running_loop().time() + self._body_seconds
        whole = False

        async def timed() -> Message:
            nonlocal whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise RequestTimeout(
                    f"the body was not complete after {self._body_seconds:g} seconds", code="body_timeout"
                ) from None
            whole = not message.get("more_body", False)
            return message

        return timed


def _host_name(host: str) -> str:
    """Of `name:port` or `[address]:port`."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower().rstrip(".")


def _without_body(send: Send) -> Send:
    async def headers_only(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await send(message)

    return headers_only
