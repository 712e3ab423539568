"""The strategy `logo`: one pass of the base over the prompt, and the experts are asked how they respond."""

import asyncio
import hashlib
import time
import uuid
from array import array
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Protocol

from loramux.adapters.lora import LoraAdapter
from loramux.adapters.residency import Handle
from loramux.adapters.responses import Listener, Responders, Signal, common_module
from loramux.kernels.team import releasing
from loramux.server.engine.local import LocalEngine
from loramux.server.engine.protocol import Engine, Sampling, Work
from loramux.server.errors import RequestError

#: Prompts whose signals are remembered.
MAX_PROMPTS = 1024
#: The key of the base's own pages, which a pass that adds nothing may read and fill.
_BASE_KEY = ""


class Hearing(Protocol):
    """A pass of the base over a prompt, wherever the base is, and what the experts make of it."""

    async def signals(
        self, prompt: tuple[int, ...], experts: Mapping[str, LoraAdapter], signal: Signal
    ) -> Sequence[float]:
        """The signal of every expert, in their order.

        Raises:
            BlendError: the experts have no module in common.
            RequestError: nothing can be heard in this engine.
            EngineError: the pass failed.
        """
        ...


class Logo:
    """Signals of the loaded experts for a prompt, remembered while the experts are the same.

    `observe` is told the seconds of each pass.
    """

    def __init__(self, hearing: Hearing, observe: Callable[[float], None]) -> None:
        self._hearing = hearing
        self._observe = observe
        self._known: OrderedDict[bytes, array[float]] = OrderedDict()

    async def signals(
        self, prompt: tuple[int, ...], experts: Mapping[str, LoraAdapter], signal: Signal
    ) -> Mapping[str, float]:
        """The signal of every expert by its id.

        Raises:
            BlendError, RequestError, EngineError: as `Hearing.signals`.
        """
        contents = "\n".join((signal, *(f"{id} {expert.content_hash}" for id, expert in experts.items())))
        key = hashlib.sha256(array("q", prompt).tobytes() + contents.encode()).digest()
        known = self._known.get(key)
        if known is None:
            started = time.monotonic()
            found = await self._hearing.signals(prompt, experts, signal)
            known = self._known[key] = array("d", found)
            self._observe(time.monotonic() - started)
            if len(self._known) > MAX_PROMPTS:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return dict(zip(experts, known, strict=True))


class LocalHearing:
    """Implements `Hearing` over the engine of this process."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._stacked: tuple[tuple[str, ...], str, Responders] | None = None

    async def signals(
        self, prompt: tuple[int, ...], experts: Mapping[str, LoraAdapter], signal: Signal
    ) -> Sequence[float]:
        if not isinstance(self._engine, LocalEngine):
            raise RequestError(
                "routing.strategy: logo listens inside the base, which this engine has elsewhere",
                param="routing.strategy",
                code="invalid_value",
            )
        module, responders = await self._responders(experts)
        listener = await self.listen(prompt, module)
        x = await asyncio.to_thread(releasing(listener.heard))
        if x is None:
            raise RuntimeError(f"nothing passed {module} of the base")
        return await asyncio.to_thread(releasing(responders.signals), x, signal)

    async def listen(self, prompt: tuple[int, ...], module: str) -> Listener:
        """A pass of the base over the prompt, heard at a module."""
        listener = Listener(module)
        scored = Sampling(max_tokens=0, temperature=0.0)
        work = Work(f"probe-{uuid.uuid4().hex}", prompt, scored, Handle(_BASE_KEY, listener))
        async with aclosing(self._engine.run(work)) as events:
            async for _ in events:
                pass
        return listener

    async def _responders(self, experts: Mapping[str, LoraAdapter]) -> tuple[str, Responders]:
        """Stacked once for a set of experts."""
        contents = tuple(expert.content_hash for expert in experts.values())
        if self._stacked is None or self._stacked[0] != contents:
            module = common_module(experts)
            made = await asyncio.to_thread(releasing(Responders), list(experts.values()), module)
            self._stacked = contents, module, made
            return module, made
        return self._stacked[1], self._stacked[2]
