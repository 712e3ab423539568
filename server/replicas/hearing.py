"""The signals of the strategy `logo`, heard at a replica, for an edge has no base."""

from collections.abc import Mapping, Sequence

from loramux.adapters.lora import LoraAdapter
from loramux.adapters.responses import Signal
from loramux.server.engine.protocol import EngineClosed, EngineError
from loramux.server.replicas.fleet import Fleet
from loramux.server.replicas.hold import MAX_DEATHS
from loramux.server.replicas.placement import Wish
from loramux.server.replicas.replica import Lost


class FleetHearing:
    """Implements `Hearing`: the replica with the least to do is asked, and another where it is lost."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def signals(
        self, prompt: tuple[int, ...], experts: Mapping[str, LoraAdapter], signal: Signal
    ) -> Sequence[float]:
        with self._fleet.changes.keeping(list(experts)):
            for _ in range(MAX_DEATHS):
                replica = await self._fleet.choose(Wish())
                replica.load += 1
                try:
                    told = await replica.ask(
                        "hear", prompt=list(prompt), experts=list(experts), signal=signal
                    )
                except Lost:
                    continue
                except EngineClosed:  # it is ending, and will be gone in a moment
                    replica.open = False
                    continue
                finally:
                    replica.load -= 1
                found: list[float] = told["signals"]
                return found
        raise EngineError(f"{MAX_DEATHS} replicas were lost while they worked on this")
