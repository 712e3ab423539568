"""Request bodies: bounded before they are parsed, and JSON that is stricter than Python's."""

import asyncio
import json
import math
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

from starlette.requests import Request

from loramux.server.errors import RequestError, TooLarge
from loramux.server.settings import Limits
from loramux.server.wire.strict import StrictModel, parse

Model = TypeVar("Model", bound=StrictModel)

MOST_DISCARDED, DISCARD_SECONDS = 1 << 28, 5.0


async def read_model(model: type[Model], request: Request, limits: Limits) -> Model:
    """The body as what it asks for.

    Raises:
        TooLarge, RequestError: as `read_json` and `parse`.
    """
    return parse(model, await read_json(request, limits.max_body_bytes), limits)


async def read_json(request: Request, limit: int) -> Any:
    """The body as JSON.

    Raises:
        TooLarge: over `limit` bytes, declared or received.
        RequestError: not UTF-8, not JSON, or a number that JSON does not have.
    """
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared[:18]) > limit:
        await _discard(request)
        raise TooLarge(f"the body may have at most {limit} bytes", code="body_too_large")
    received = bytearray()
    async for chunk in request.stream():
        received += chunk
        if len(received) > limit:
            await _discard(request)
            raise TooLarge(f"the body may have at most {limit} bytes", code="body_too_large")
    return decode_json(bytes(received))


async def _discard(request: Request) -> None:
    """Read on for a moment: a client that is still sending would see a reset connection, not the answer."""
    if "expect" in request.headers:  # it waits for a word before it sends
        return
    left = MOST_DISCARDED
    with suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_SECONDS):
            while left > 0:
                message = await request.receive()
                left -= len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return


def decode_json(body: bytes) -> Any:
    """Strict JSON.

    Raises:
        RequestError: not UTF-8, not JSON, NaN or infinity, a number no float can hold, nested too
            deep, or half of a surrogate pair.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _invalid(f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except UnicodeEncodeError:
        raise _invalid("the body has half of a surrogate pair, which is no character") from None
    except RecursionError:
        raise _invalid("the body is nested too deep") from None
    except json.JSONDecodeError as error:
        raise _invalid(f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except ValueError:
        raise _invalid("the body has a number that is too long") from None


def _refuse_constant(name: str) -> NoReturn:
    raise _invalid(f"the body is not JSON: {name} is not a JSON value")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _invalid(f"the body has the number {text[:32]}, which is out of range")
    return value


def _invalid(message: str) -> RequestError:
    return RequestError(message, code="invalid_json")
