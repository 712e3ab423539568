"""`GET /`: the playground, a page to talk to the server in a browser."""

import re
from base64 import b64encode
from hashlib import sha256
from importlib.resources import files

from fastapi import APIRouter, Response

from loramux.server.parts import Parts

_INLINE = re.compile(rb"<(script|style)>(.*?)</\1>", re.DOTALL)


def policy(page: bytes) -> str:
    """The content security policy of a page: its inline script and style, by hash, and calls to this server.

    Text of a model can become nothing but text: no string is ever made into markup or code (trusted types),
    no address is loaded, and nothing embeds the page. The one image is the icon in the page itself.
    """
    hashes = {
        kind.decode(): f"'sha256-{b64encode(sha256(text).digest()).decode()}'"
        for kind, text in _INLINE.findall(page)
    }
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {hashes['script']}",
            f"style-src {hashes['style']}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )


def playground_routes(_: Parts) -> APIRouter:
    """The route. The page is one file, has no secret in it, and asks nothing of other hosts."""
    router = APIRouter()
    page = files("loramux.server.routes").joinpath("playground.html").read_bytes()
    headers = {
        "content-security-policy": policy(page),
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }

    @router.get("/")
    async def playground() -> Response:
        return Response(page, media_type="text/html; charset=utf-8", headers=headers)

    return router
