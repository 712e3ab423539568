"""A running server, as the terminal talks to it: JSON routes and streamed chats; standard library alone."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from loramux.server.errors import StartError

_TIMEOUT = 600.0


class RemoteError(StartError):
    """The server refused, failed, or cannot be reached; one line."""


@dataclass(slots=True)
class Answer:
    """One streamed chat; `text()` fills the rest. Times are seconds since the request, as seen here."""

    response: HTTPResponse
    started: float
    loramux: dict[str, Any] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)
    finish: str | None = None
    first: float | None = None
    last: float | None = None

    def events(self) -> Iterator[dict[str, Any]]:
        """The chunks.

        Raises:
            RemoteError: an error event, or an end without `[DONE]`.
        """
        for line in self._lines():
            data = line.removeprefix(b"data: ").strip() if line.startswith(b"data: ") else b""
            if data == b"[DONE]":
                return
            if data:
                chunk: dict[str, Any] = json.loads(data)
                if "error" in chunk:
                    raise RemoteError(chunk["error"]["message"])
                yield chunk
        raise RemoteError("the answer ended early")

    def text(self) -> Iterator[str]:
        """Pieces of the answer as they come; the decision is in `loramux` before the first."""
        for chunk in self.events():
            self.loramux = chunk.get("loramux") or self.loramux
            self.usage = chunk.get("usage") or self.usage
            for choice in chunk["choices"]:
                self.finish = choice["finish_reason"] or self.finish
                if piece := choice["delta"].get("content"):
                    self.last = time.monotonic() - self.started
                    self.first = self.last if self.first is None else self.first
                    yield piece

    def close(self) -> None:
        """Let go of the server, which then stops."""
        self.response.close()

    def _lines(self) -> Iterator[bytes]:
        try:
            yield from self.response
        except (OSError, HTTPException) as error:
            raise RemoteError(f"the answer broke off: {error}") from None

    @property
    def speed(self) -> float | None:
        """Tokens a second after the first."""
        tokens = self.usage.get("completion_tokens", 0)
        if self.first is None or self.last is None or tokens < 2 or self.last == self.first:
            return None
        return float((tokens - 1) / (self.last - self.first))


class Remote:
    """A server by its address, with or without `/v1`."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """Raises RemoteError when `url` is no address."""
        if urlsplit(url).scheme not in ("http", "https"):
            raise RemoteError(f"{url!r} is no address of a server; try http://127.0.0.1:8000")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"content-type": "application/json"}
        if key:
            self._headers["authorization"] = f"Bearer {key}"

    def models(self) -> list[str]:
        """What `model` may be."""
        return [model["id"] for model in self._json("/v1/models")["data"]]

    def route(self, text: str) -> dict[str, Any]:
        """The router's decision about a text."""
        decision: dict[str, Any] = self._json("/v1/route", {"input": text})
        return decision

    def chat(self, model: str, messages: Sequence[Mapping[str, str]], **fields: Any) -> Answer:
        """A streamed chat."""
        body = {
            "model": model,
            "messages": list(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            **{name: value for name, value in fields.items() if value is not None},
        }
        started = time.monotonic()
        return Answer(self._open("/v1/chat/completions", body), started)

    def _json(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        with self._open(path, body) as answer:
            try:
                return json.load(answer)
            except ValueError:
                raise RemoteError(f"{self.url}{path} is no answer of a loramux server") from None

    def _open(self, path: str, body: Mapping[str, Any] | None) -> HTTPResponse:
        data = None if body is None else json.dumps(body).encode()
        # The scheme was checked above.
        request = Request(self.url + path, data=data, headers=self._headers)  # noqa: S310
        try:
            response: HTTPResponse = urlopen(request, timeout=_TIMEOUT)  # noqa: S310
        except HTTPError as error:
            with error:
                raise RemoteError(_problem(error)) from None
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise RemoteError(
                f"no server answers at {self.url}: {reason}; is `loramux serve` running?"
            ) from None
        return response


def _problem(error: HTTPError) -> str:
    try:
        message: str = json.load(error)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"the server answered {error.code}"
    return message
