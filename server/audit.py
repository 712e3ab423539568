"""A sampled share of routed answers, scored again afterwards: what routing gains on the traffic itself."""

import asyncio
import logging
import random
from collections.abc import Callable

from loramux.adapters.errors import AdapterError
from loramux.server.ask import Ask
from loramux.server.counterfactuals import Counterfactuals
from loramux.server.engine.protocol import EngineError, EngineStats
from loramux.server.errors import ServerError
from loramux.server.lifecycle import Lifecycle
from loramux.server.metrics import Metrics
from loramux.server.selection import Selection

log = logging.getLogger("loramux")


class Audits:
    """One audit at a time, and none while a sequence waits: requests come first, and an audit that has no
    place is dropped, never queued.

    Args:
        share: of the routed answers, 0 to 1.
        draw: a number from 0 to below 1, uniform.
    """

    def __init__(
        self,
        counterfactuals: Counterfactuals,
        *,
        share: float,
        stats: Callable[[], EngineStats],
        metrics: Metrics,
        lifecycle: Lifecycle,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._counterfactuals = counterfactuals
        self._share = share
        self._stats = stats
        self._metrics = metrics
        self._lifecycle = lifecycle
        self._draw = draw
        self._running: asyncio.Task[None] | None = None

    def offer(self, ask: Ask, selection: Selection, job_id: str) -> None:
        """A request has been answered in full."""
        if not selection.is_routed or self._draw() >= self._share:
            return
        if self._running is not None or self._stats().waiting:
            self._metrics.audited("dropped")
            return
        self._running = asyncio.create_task(self._audit(ask, selection, f"{job_id}-audit"))

    async def _audit(self, ask: Ask, selection: Selection, id: str) -> None:
        try:
            with self._lifecycle.working():  # a drain waits for it as for a request
                found = await self._counterfactuals.measure(ask, selection, id)
        except (AdapterError, EngineError, ServerError) as error:
            log.info("an audit failed: %s", error)
            self._metrics.audited("failed")
        else:
            losses = {"base": found.base, "blend": found.blend}
            if found.top1 is not None:
                losses["top1"] = found.top1
            self._metrics.audited("measured", found.expert, found.tokens, losses)
        finally:
            self._running = None
