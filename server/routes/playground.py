"""`GET /`: a page to try the server in a browser."""

from importlib.resources import files

from fastapi import APIRouter, Response

from loramux.server.parts import Parts

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


def playground_routes(_: Parts) -> APIRouter:
    """The route. The page is one file and asks nothing of other hosts."""
    router = APIRouter()
    page = files("loramux.server.routes").joinpath("playground.html").read_bytes()

    @router.get("/")
    async def playground() -> Response:
        return Response(
            page, media_type="text/html; charset=utf-8", headers={"content-security-policy": POLICY}
        )

    return router
