"""`GET /metrics`, in Prometheus' text format."""

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from loramux.server.parts import Parts


def metrics_routes(parts: Parts) -> APIRouter:
    """The route; none when metrics are off."""
    router = APIRouter()
    if parts.settings.metrics:

        @router.get("/metrics")
        async def metrics() -> Response:
            return Response(parts.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return router
