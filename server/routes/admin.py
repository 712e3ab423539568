"""Adapter administration; the key was checked before the router."""

from fastapi import APIRouter, Request, Response

from loramux.adapters.lora import LoraAdapter
from loramux.adapters.sparse.shelf import SparseCard
from loramux.server.catalog import route_fields
from loramux.server.edge.answer import JsonAnswer
from loramux.server.edge.body import read_model
from loramux.server.parts import Parts
from loramux.server.wire.admin import LoadAdapterRequest, UnloadAdapterRequest


def admin_routes(parts: Parts) -> APIRouter:
    """The routes."""
    router = APIRouter()
    limits = parts.settings.limits

    @router.post("/v1/load_lora_adapter")
    async def load(request: Request) -> Response:
        asked = await read_model(LoadAdapterRequest, request, limits)
        with parts.metrics.adapter_load():
            loaded = await parts.admin.load(
                asked.lora_name, asked.lora_path, asked.options, asked.routing_examples
            )
        answer = _described(loaded.adapter)
        if isinstance(loaded.adapter, LoraAdapter):
            answer |= route_fields(parts.catalog.routed().get(loaded.adapter.id))
        if loaded.truncated is not None:
            answer["truncated_examples"] = loaded.truncated
        return JsonAnswer(answer)

    @router.post("/v1/unload_lora_adapter")
    async def unload(request: Request) -> Response:
        asked = await read_model(UnloadAdapterRequest, request, limits)
        await parts.admin.unload(asked.lora_name)
        return JsonAnswer({"id": asked.lora_name, "unloaded": True})

    @router.get("/v1/lora_adapters")
    async def adapters() -> Response:
        resident = set(parts.residency.stats().resident_experts)
        experts = parts.catalog.experts
        routed = parts.catalog.routed()
        data = [
            _described(experts[name]) | {"resident": name in resident} | route_fields(routed.get(name))
            for name in sorted(experts)
        ]
        sparse = parts.catalog.sparse
        data += [_described(sparse[name]) | {"resident": True} for name in sorted(sparse)]
        return JsonAnswer({"object": "list", "data": data})

    return router


def _described(adapter: LoraAdapter | SparseCard) -> dict[str, object]:
    if isinstance(adapter, SparseCard):
        return {
            "id": adapter.id,
            "kind": adapter.kind,
            "content_hash": adapter.content_hash,
            "rank": adapter.rank,
            "modules": adapter.modules,
            "bytes": adapter.nbytes,
        }
    return {
        "id": adapter.id,
        "kind": "lora",
        "content_hash": adapter.content_hash,
        "rank": adapter.max_rank,
        "modules": len(adapter.pairs),
        "bytes": adapter.nbytes,
    }
