"""HTTP to one backend: JSON in and out, and streams of server-sent events."""

import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import httpx

from loramux.server.backend.errors import BackendDown, BackendError

CONNECT_SECONDS = 5.0
_MESSAGE_CHARACTERS = 300
_UNAVAILABLE = (502, 503, 504)
_NO_KEY = (401, 403)


class Refused(BackendError):
    """An answer with an error status."""

    def __init__(self, url: str, path: str, status: int, message: str) -> None:
        way = "name its key in backend.api_key" if status in _NO_KEY else ""
        super().__init__(f"backend {url}: {path} answered {status}: {message}", way)
        self.status = status
        self.message = message


class Connection:
    """Connections to one server, kept alive. Made anew by every `open`, for the event loop that runs then.

    Args:
        url: `http://host:port`, or with a path before the routes.
        key: sent as a bearer token.
        seconds: how long the server may be silent in the middle of an answer.
    """

    def __init__(self, url: str, *, key: str | None, seconds: float) -> None:
        self.url = url.rstrip("/")
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._timeout = httpx.Timeout(seconds, connect=CONNECT_SECONDS, pool=None)
        self._client: httpx.AsyncClient | None = None

    async def open(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._client = httpx.AsyncClient(
            base_url=self.url, headers=self._headers, timeout=self._timeout, limits=limits, trust_env=False
        )

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def get(self, path: str) -> Any:
        """The JSON of a route.

        Raises:
            Refused, BackendDown, BackendError: an error status, no connection, no JSON.
        """
        return await self._ask("GET", path, None)

    async def reach(self, path: str) -> None:
        """As `get`, whatever the answer holds."""
        await self._send("GET", path, None)

    async def post(self, path: str, body: Mapping[str, object]) -> Any:
        """As `get`; `None` where the answer is not JSON."""
        return await self._ask("POST", path, body)

    async def events(self, path: str, body: Mapping[str, object]) -> AsyncGenerator[dict[str, Any]]:
        """The objects of a stream of server-sent events, up to `[DONE]`; closing it ends the connection.

        Raises:
            Refused: an error status, or an error among the events.
            BackendDown: no connection, or one that broke off before the end.
        """
        try:
            async with self._open_client().stream("POST", path, json=body) as response:
                if response.is_error:
                    await response.aread()
                    raise self._refused(path, response)
                async for line in _lines(response):
                    if not line.startswith(b"data:"):
                        continue
                    text = line[5:].strip()
                    if text == b"[DONE]":
                        return
                    yield self._event(path, text)
        except httpx.TransportError as error:
            raise self._down(error) from None

    async def _send(self, method: str, path: str, body: Mapping[str, object] | None) -> httpx.Response:
        try:
            response = await self._open_client().request(method, path, json=body)
        except httpx.TransportError as error:
            raise self._down(error) from None
        if response.is_error:
            raise self._refused(path, response)
        return response

    async def _ask(self, method: str, path: str, body: Mapping[str, object] | None) -> Any:
        response = await self._send(method, path, body)
        try:
            return response.json()
        except ValueError:
            if method == "POST":
                return None
            raise BackendError(f"backend {self.url}: {path} did not answer with JSON") from None

    def _open_client(self) -> httpx.AsyncClient:
        if self._client is None:
            raise BackendDown(f"backend {self.url}: not connected")
        return self._client

    def _event(self, path: str, text: bytes) -> dict[str, Any]:
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise BackendError(f"backend {self.url}: {path} sent an event that is no JSON object")
        if isinstance(error := found.get("error"), dict):
            raise Refused(self.url, path, _number(error.get("code")), _line(error.get("message")))
        return found

    def _refused(self, path: str, response: httpx.Response) -> BackendError:
        try:
            told = response.json()
            message = told["error"]["message"] if "error" in told else told.get("message") or told["detail"]
        except (ValueError, KeyError, TypeError, AttributeError):
            message = response.text or response.reason_phrase
        if response.status_code in _UNAVAILABLE:
            return BackendDown(
                f"backend {self.url}: {path} answered {response.status_code}: {_line(message)}"
            )
        return Refused(self.url, path, response.status_code, _line(message))

    def _down(self, error: httpx.TransportError) -> BackendDown:
        reason = _line(str(error)) or type(error).__name__
        return BackendDown(f"backend {self.url}: {reason}")


async def _lines(response: httpx.Response) -> AsyncGenerator[bytes]:
    """Lines as server-sent events mean them; httpx would end one at U+2028 too, which JSON may hold."""
    rest = b""
    async for part in response.aiter_bytes():
        *whole, rest = (rest + part).split(b"\n")
        for line in whole:
            yield line.rstrip(b"\r")
    if rest:
        yield rest


def _number(given: object) -> int:
    return given if isinstance(given, int) else 500


def _line(message: object) -> str:
    return " ".join(str(message).split())[:_MESSAGE_CHARACTERS]
