"""A server whose engine computes: the whole of the real parts over a tiny random base and its experts."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import torch

from loramux.adapters.arena import Arena
from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.layers import AdapterLayers
from loramux.adapters.residency import Residency
from loramux.adapters.sparse.model import SparseModel
from loramux.adapters.sparse.shelf import Shelf
from loramux.adapters.sparse.token_methods import token_experts
from loramux.adapters.sparse.token_mixtures import TokenMixtures
from loramux.server.build import place_model, read_adapter
from loramux.server.connect import connect
from loramux.server.engine.grammars import Grammars
from loramux.server.engine.local import EngineLimits, LocalEngine
from loramux.server.metrics import Metrics
from loramux.server.parts import Parts
from loramux.server.settings import load_settings
from tests.http.serving import BASE, TOKENIZER, listening
from tests.kit import WordRouter
from tests.tiny import random_adapter, tiny_llama
from tests.tiny_sparse import random_experts, random_loracoe, random_mixlora

ADMIN = {"authorization": "Bearer admin"}
BLEND = {"model": "auto", "lora": [{"id": "code", "scale": 0.6}, {"id": "law", "scale": 0.4}]}
ARROW = {"model": "auto", "routing": {"strategy": "arrow", "top_m": 2}}
LOGO = {"model": "auto", "routing": {"strategy": "logo", "top_m": 2}}
SPECTR = {"model": "auto", "routing": {"strategy": "spectr", "top_m": 2}}


@dataclass
class Live:
    """A server whose engine computes."""

    http: httpx.Client
    parts: Parts
    engine: LocalEngine
    shapes: BaseShapes
    root: Path

    def complete(self, prompt: tuple[int, ...], tokens: int = 16, **fields: Any) -> dict[str, Any]:
        body = {"prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "logprobs": 0, **fields}
        answer = self.http.post("/v1/completions", json={"ignore_eos": True, **body})
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def admin(self, action: str, **body: object) -> httpx.Response:
        return self.http.post(f"/v1/{action}_lora_adapter", json=body, headers=ADMIN)

    def sparse_bytes(self) -> int:
        return self.parts.shelf.stats().nbytes


def random_prompt(length: int) -> tuple[int, ...]:
    """Bytes, as ids of the tokenizer of bytes."""
    return tuple(torch.randint(256, (length,)).tolist())


@contextmanager
def live(
    root: Path,
    *,
    tokenizer: Any = TOKENIZER,
    engine_limits: EngineLimits | None = None,
    context: int = 512,
    **flags: Any,
) -> Iterator[Live]:
    """A server on a free port; whatever was leased is given back at its end."""
    settings = load_settings(flags={"admin_key": "admin", "drain_seconds": 2, **flags})
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=context)
    shapes = BaseShapes.from_model(model, BASE)
    experts = {name: random_adapter(shapes, 4, name) for name in ("code", "law", "math")}
    sparse: list[SparseModel] = [
        random_mixlora(shapes, "mix"),
        random_loracoe(shapes, "coe"),
        random_experts(shapes, "moe"),
        random_experts(shapes, "mola", top_k=2),
    ]
    arena = Arena(shapes, 64)
    residency = Residency(experts, arena)
    grammars = Grammars(tokenizer, (), len(tokenizer))
    chosen = engine_limits or EngineLimits(kv_tokens=4096, page_size=8, max_batch_tokens=128)
    layers = AdapterLayers(model, arena)
    engine = LocalEngine(model, layers, eos_ids=(), limits=chosen, grammars=grammars)
    cpu = torch.device("cpu")
    shelf = Shelf(partial(place_model, layers=layers, device=cpu, dtype=torch.float32), sparse)
    mixtures = TokenMixtures(token_experts)
    parts = connect(
        settings,
        metrics=Metrics(BASE, engine.stats, residency.stats, sparse_stats=shelf.stats),
        keys=(),
        base=BASE,
        residency=residency,
        shelf=shelf,
        mixtures=mixtures,
        engine=engine,
        router=WordRouter(tuple(experts)),
        tokenizer=tokenizer,
        grammars=grammars,
        read=partial(read_adapter, shapes=shapes, dtype=torch.float32, host_dtype=None, pinned=False),
        adapter_root=root,
        fingerprint="loramux-test",
    )
    with listening(parts) as (url, _), httpx.Client(base_url=url, timeout=60) as http:
        yield Live(http, parts, engine, shapes, root)
        residency.check_integrity()
        shelf.check_integrity()
