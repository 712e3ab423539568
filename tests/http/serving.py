"""A server over a real socket: real routes, pipeline and residency; the engine says what it is told."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import httpx
import openai
import torch
import uvicorn

from loramux.adapters.arena import Arena
from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.errors import AdapterFormatError
from loramux.adapters.lora import LoraAdapter, LoraPair
from loramux.adapters.residency import Residency
from loramux.adapters.sparse.model import (
    Kind,
    RankMixture,
    SparseModel,
)
from loramux.adapters.sparse.options import ReadOptions
from loramux.adapters.sparse.shelf import Shelf
from loramux.adapters.sparse.tally import ExpertLoad
from loramux.adapters.sparse.token_mixtures import TokenMethod, TokenMixtures
from loramux.server.app import create_app
from loramux.server.connect import connect
from loramux.server.engine.grammars import Grammars
from loramux.server.metrics import Metrics
from loramux.server.parts import Parts
from loramux.server.settings import Settings, load_settings
from loramux.server.traces import NO_TRACES, Traces
from tests.kit import ScriptedEngine, WordRouter, byte_tokenizer, saying

BASE = "tiny-base"
EXPERTS = ("code", "law", "math")
SHAPES = BaseShapes(BASE, {"up": (24, 16), "down": (16, 24)})
TOKENIZER = byte_tokenizer()

Result = TypeVar("Result")


def expert(name: str, rank: int = 4, content: str | None = None) -> LoraAdapter:
    """A random adapter; `content` stands for what its files hold."""
    pairs = {
        module: LoraPair(torch.randn(rank, n_in), torch.randn(n_out, rank), 1.0)
        for module, (n_out, n_in) in SHAPES.modules.items()
    }
    return LoraAdapter(name, f"hash of {content or name}", pairs)


def sparse_model(name: str, kind: Kind = Kind.LORACOE, rank: int = 4) -> SparseModel:
    """A random sparse model."""
    mixture = RankMixture(
        torch.randn(rank, 16), torch.randn(24, rank), 1.0, torch.randn(2 * rank, 16), experts=2
    )
    return SparseModel(
        name, kind, f"sha256:{name}", linear={"up": mixture}, summary={"experts": 2, "rank": rank}
    )


@dataclass(eq=False)
class Tray:
    """Stands for a placed model; the scripted engine computes nothing with it."""

    model: SparseModel
    released: bool = False
    nbytes: int = 1000

    def load(self) -> ExpertLoad:
        return ExpertLoad((5, 3), 0.25)

    def release(self) -> None:
        self.released = True


@dataclass(eq=False)
class Quiver:
    """Stands for experts made ready for arrow or spectr."""

    method: TokenMethod
    experts: Sequence[LoraAdapter]
    nbytes: int = 500

    def slot(self, top_k: int, temperature: float) -> Any:
        return (self, top_k, temperature)


def read_expert(folder: Path, name: str, _options: ReadOptions) -> LoraAdapter | SparseModel:
    """Stands for the readers: a folder with a file `ok` is an adapter, one with `sparse` a sparse model."""
    if (folder / "sparse").exists():
        return sparse_model(name)
    if not (folder / "ok").exists():
        raise AdapterFormatError(f"{folder.name}: adapter_config.json is missing")
    return expert(name, content=folder.name)


class Served:
    """A running server and the parts inside it."""

    def __init__(self, parts: Parts, engine: ScriptedEngine, router: WordRouter, url: str) -> None:
        self.parts = parts
        self.engine = engine
        self.router = router
        self.url = url
        self.loop: asyncio.AbstractEventLoop | None = None
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        self.http = httpx.Client(base_url=url, timeout=30)

    def on_loop(self, work: Callable[[], Result]) -> Result:
        """Run `work` on the server's event loop."""

        async def call() -> Result:
            return work()

        assert self.loop is not None
        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(10)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Let the server's loop turn until `condition` holds."""

        async def turn() -> None:
            async with asyncio.timeout(20):
                while not condition():
                    await asyncio.sleep(0.002)

        assert self.loop is not None
        asyncio.run_coroutine_threadsafe(turn(), self.loop).result(30)

    def hold(self) -> None:
        """From now on no sequence gets another token."""
        self.engine.gate = asyncio.Event()

    def release(self) -> None:
        """Go on."""
        gate, self.engine.gate = self.engine.gate, None
        if gate is not None:
            self.on_loop(gate.set)

    def chat(self, text: str = "hello", **options: Any) -> Any:
        """A chat of one message through the OpenAI client."""
        messages = [{"role": "user", "content": text}]
        return self.client.chat.completions.create(**{"model": "auto", "messages": messages, **options})

    def metric(self, name: str, **labels: str) -> float:
        """A sample of `/metrics`."""
        return self.parts.metrics.registry.get_sample_value(name, labels) or 0.0


@contextmanager
def serving(
    tmp_path: Path,
    *,
    engine: ScriptedEngine | None = None,
    keys: tuple[str, ...] = (),
    sparse: Sequence[SparseModel] = (),
    router: Any = None,
    traces: Traces = NO_TRACES,
    tokenizer: Any = TOKENIZER,
    pool_sampling: Mapping[str, int | float] = MappingProxyType({}),
    **flags: Any,
) -> Iterator[Served]:
    """A server on a free port, stopped at the end; no lease and no row may be left over.

    Its pool has the experts that the router knows.
    """
    settings: Settings = load_settings(flags={"drain_seconds": 2, **flags})
    engine = engine or ScriptedEngine(saying(TOKENIZER, "Hello, world."))
    router = router or WordRouter(EXPERTS)
    residency = Residency({name: expert(name) for name in router.experts}, Arena(SHAPES, 64))
    shelf = Shelf(Tray, sparse)
    mixtures = TokenMixtures(Quiver)
    metrics = Metrics(
        BASE,
        engine.stats,
        residency.stats,
        sparse_stats=shelf.stats,
        token_bytes=lambda: mixtures.nbytes,
    )
    parts = connect(
        settings,
        metrics=metrics,
        keys=keys,
        base=BASE,
        residency=residency,
        shelf=shelf,
        mixtures=mixtures,
        engine=engine,
        router=router,
        tokenizer=tokenizer,
        grammars=Grammars(tokenizer, ()),
        read=read_expert,
        adapter_root=tmp_path / "adapters",
        fingerprint="loramux-test",
        traces=traces,
        sampling=pool_sampling,
    )
    with listening(parts) as (url, loop):
        running = Served(parts, engine, router, url)
        running.loop = loop
        try:
            yield running
            running.release()
            running.wait_for(lambda: parts.lifecycle.active == 0)
            residency.check_integrity()
            shelf.check_integrity()
            assert residency.stats().pinned_bytes == 0
            assert engine.running == 0
            assert not parts.metrics.live
        finally:
            running.http.close()
            running.client.close()


@contextmanager
def listening(parts: Parts) -> Iterator[tuple[str, asyncio.AbstractEventLoop]]:
    """The app over `parts` on a free port, in a thread of its own; its address and its loop."""
    server = uvicorn.Server(uvicorn.Config(create_app(parts), port=0, log_level="warning", lifespan="on"))
    started = threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        task = asyncio.create_task(server.serve())
        while not server.started and not task.done():
            await asyncio.sleep(0.002)
        started.set()
        await task

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    assert started.wait(30)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", loops[0]
    finally:
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive()
