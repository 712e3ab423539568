"""How the pool of all replicas changes: at every one of them, or at none."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from loramux.adapters.errors import AdapterError
from loramux.adapters.lora import LoraAdapter
from loramux.adapters.sparse.options import ReadOptions
from loramux.adapters.sparse.shelf import SparseCard
from loramux.adapters.sparse.token_mixtures import TokenMixture
from loramux.server.errors import NotReady
from loramux.server.leases import Mixture, SparseChoice
from loramux.server.replicas.frames import Message
from loramux.server.replicas.outline import card_of, outlined
from loramux.server.replicas.replica import Lost, Replica

log = logging.getLogger("loramux")


class PoolsDiffer(Exception):
    """A replica that was started again has other files before it than those that run."""


@dataclass(frozen=True, slots=True)
class _Added:
    """Where an adapter came from that the pool does not have."""

    folder: Path
    options: ReadOptions


class Changes:
    """Two phases. First every replica does what is asked, which nobody sees, for requests name only what the
    edge shows; then the edge shows it, or every replica takes it back. One that dies on the way is given the
    pool as the edge has it when it starts again; one that cannot take back is ended for that reason.

    What is taken out stays at the replicas until the last request that uses it has ended: it may have to go
    on at another one.
    """

    def __init__(
        self,
        experts: dict[str, LoraAdapter],
        cards: dict[str, SparseCard],
        replicas: Callable[[], Sequence[Replica]],
    ) -> None:
        self.busy = asyncio.Lock()
        self._replicas = replicas
        self._experts = experts
        self._cards = cards
        self._held = _contents(experts, cards)  # what every replica holds: by id its content
        self._added: dict[str, _Added] = {}
        self._removed: set[str] = set()
        self._users: Counter[str] = Counter()
        self._retired: set[str] = set()

    async def add(self, name: str, folder: Path, options: ReadOptions) -> LoraAdapter | SparseCard:
        """Have every replica read an adapter or sparse model and be ready to serve it as `name`; to be called
        while `busy` is held. `show` it, or `take_back`.

        Raises:
            AdapterError: a replica refuses it, and none has it now.
            NotReady: a replica was lost meanwhile, and none has it now; or there is none.
        """
        if name in self._retired:
            await self._remove(name)
        replicas = self._replicas()
        if not replicas:
            raise NotReady("no replica is running; nothing was changed")
        order: Message = {"name": name, "folder": str(folder), "options": asdict(options)}
        answers = await asyncio.gather(
            *(replica.ask("add", **order) for replica in replicas), return_exceptions=True
        )
        found = [_found(answer) for answer in answers if isinstance(answer, dict)]
        failures = [answer for answer in answers if isinstance(answer, BaseException)]
        if not failures and len({one.content_hash for one in found}) > 1:
            failures = [AdapterError(f"{folder.name}: the files changed while they were read")]
        if failures:
            await self._take_back(
                name, [one for one, answer in zip(replicas, answers, strict=True) if isinstance(answer, dict)]
            )
            lost = next((one for one in failures if isinstance(one, Lost)), None)
            if lost is not None:
                raise NotReady(f"{lost} during the change; nothing was changed") from None
            raise failures[0]
        self._held[name] = found[0].content_hash
        self._added[name] = _Added(folder, options)
        return found[0]

    def show(self, found: LoraAdapter | SparseCard) -> None:
        """From now on requests may name it."""
        if isinstance(found, LoraAdapter):
            self._experts[found.id] = found
        else:
            self._cards[found.id] = found

    async def take_back(self, name: str) -> None:
        """Undo `add` at every replica."""
        del self._held[name], self._added[name]
        await self._take_back(name, self._replicas())

    async def remove(self, name: str) -> None:
        """Have every replica let go of what is no longer shown: now, or when nothing uses it any more; to be
        called while `busy` is held."""
        if self._users[name]:
            self._retired.add(name)
        else:
            await self._remove(name)

    @contextmanager
    def using(self, mixture: Mixture) -> Iterator[None]:
        """A request uses a mixture, and what it is made of stays at the replicas."""
        with self.keeping(_names(mixture)):
            yield

    @contextmanager
    def keeping(self, names: Sequence[str]) -> Iterator[None]:
        """What has these names stays at the replicas."""
        self._users.update(names)
        try:
            yield
        finally:
            self._users.subtract(names)
            if any(name in self._retired and not self._users[name] for name in names):
                self._sweeping = asyncio.get_running_loop().create_task(self._sweep())

    @asynccontextmanager
    async def applied_to(self, replica: Replica) -> AsyncIterator[None]:
        """Give a replica that has the pool of the disk the pool as it is now; no change happens within.

        Raises:
            PoolsDiffer: what it holds then is not what the others hold. Lost: it went away.
        """
        async with self.busy:
            theirs = _contents(
                {one.id: one for one in outlined(replica.hello["experts"])},
                {card["id"]: card_of(card) for card in replica.hello["sparse"]},
            )
            for name in self._removed:
                if theirs.pop(name, None) is not None:
                    await replica.ask("remove", name=name)
            for name, source in self._added.items():
                order = {"name": name, "folder": str(source.folder), "options": asdict(source.options)}
                try:
                    theirs[name] = _found(await replica.ask("add", **order)).content_hash
                except AdapterError as error:
                    raise PoolsDiffer(f"{name!r} cannot be loaded again: {error}") from None
            if theirs != self._held:
                name = min(key for key in {*theirs, *self._held} if theirs.get(key) != self._held.get(key))
                raise PoolsDiffer(f"the files of {name!r} are not those that the other replicas serve")
            yield

    async def _sweep(self) -> None:
        async with self.busy:
            for name in [name for name in self._retired if not self._users[name]]:
                await self._remove(name)

    async def _remove(self, name: str) -> None:
        self._retired.discard(name)
        del self._held[name]
        if self._added.pop(name, None) is None:
            self._removed.add(name)
        await self._take_back(name, self._replicas())

    async def _take_back(self, name: str, replicas: Sequence[Replica]) -> None:
        """What cannot fail; a replica where it does is ended, and comes again with the right pool."""

        async def take(replica: Replica) -> None:
            try:
                with suppress(Lost):
                    await replica.ask("remove", name=name)
            except Exception as error:
                log.error("replica %d cannot let go of %r: %s; it is ended", replica.number, name, error)
                replica.kill()

        await asyncio.gather(*map(take, replicas))


def _found(answer: Message) -> LoraAdapter | SparseCard:
    return card_of(answer["sparse"]) if "sparse" in answer else outlined(answer["expert"])[0]


def _contents(experts: dict[str, LoraAdapter], cards: dict[str, SparseCard]) -> dict[str, str]:
    return {name: one.content_hash for name, one in experts.items()} | {
        name: card.content_hash for name, card in cards.items()
    }


def _names(mixture: Mixture) -> list[str]:
    match mixture:
        case SparseChoice():
            return [mixture.id]
        case TokenMixture():
            return [expert.id for expert in mixture.experts]
    return [part.expert_id for part in mixture.parts]
