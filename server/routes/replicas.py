"""Administration of replicas; the key was checked before the router."""

from fastapi import APIRouter, Request, Response

from loramux.server.edge.body import read_json
from loramux.server.errors import Conflict
from loramux.server.parts import Parts
from loramux.server.wire.replicas import DrainReplicaRequest, ReplicaCard
from loramux.server.wire.strict import encode_json, parse


def replica_routes(parts: Parts) -> APIRouter:
    """The routes."""
    router = APIRouter()
    limits = parts.settings.limits
    fleet = parts.fleet

    def cards() -> list[ReplicaCard]:
        if fleet is None:
            return []
        return [
            {
                "replica": one.number,
                "up": one.up,
                "pid": one.pid,
                "sequences": one.sequences,
                "restarts": one.restarts,
                "moved_sequences": one.moved,
            }
            for one in fleet.stats()
        ]

    @router.get("/v1/replicas")
    async def replicas() -> Response:
        return Response(encode_json({"object": "list", "data": cards()}), media_type="application/json")

    @router.post("/v1/drain_replica")
    async def drain(request: Request) -> Response:
        asked = parse(DrainReplicaRequest, await read_json(request, limits.max_body_bytes), limits)
        if fleet is None or not await fleet.drain(asked.replica):
            known = ", ".join(str(card["replica"]) for card in cards() if card["up"]) or "none"
            raise Conflict(
                f"replica {asked.replica} cannot be drained: it is not up, or no other one is (up: {known})",
                param="replica",
            )
        body = {"replica": asked.replica, "drained": True}
        return Response(encode_json(body), media_type="application/json")

    return router
