"""Changes of the pool: at every replica, or at none."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.blend import Blend
from loramux.adapters.errors import AdapterError
from loramux.adapters.sparse.options import DEFAULT
from loramux.server.errors import NotReady
from loramux.server.replicas.changes import Changes, PoolsDiffer
from loramux.server.replicas.outline import outlines
from loramux.server.replicas.replica import Lost
from tests.tiny import random_adapter

SHAPES = BaseShapes("tiny", {"up": (24, 16)})
POOL = {name: random_adapter(SHAPES, 4, name) for name in ("code", "law")}
FOLDER = Path("/pool/new")


class Site:
    """What a replica does with its pool, and how it can fail."""

    def __init__(self, number: int, *, fails: Exception | None = None, keeps: bool = False) -> None:
        self.number = number
        self.hello = {"experts": outlines(POOL.values()), "sparse": []}
        self.holds = {name: one.content_hash for name, one in POOL.items()}
        self.killed = False
        self._fails = fails
        self._keeps = keeps

    async def ask(self, do: str, *, name: str, **fields: Any) -> dict[str, Any]:
        await asyncio.sleep(0)
        if do == "remove":
            if self._keeps:
                raise RuntimeError("cannot")
            del self.holds[name]
            return {}
        if self._fails is not None:
            raise self._fails
        found = NEW[name]
        self.holds[name] = found.content_hash
        return {"expert": outlines([found])}

    def kill(self) -> None:
        self.killed = True


NEW = {name: random_adapter(SHAPES, 4, name) for name in ("new", "law")}


def changes(*sites: Site) -> Changes:
    return Changes(dict(POOL), {}, lambda: sites)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    ("failure", "kind"),
    [(AdapterError("damaged"), AdapterError), (Lost(1, died=True), NotReady)],
    ids=["refused", "lost"],
)
def test_where_one_fails_none_has_it(failure: Exception, kind: type[Exception]) -> None:
    good, bad = Site(0), Site(1, fails=failure)
    with pytest.raises(kind):
        asyncio.run(changes(good, bad).add("new", FOLDER, DEFAULT))
    assert "new" not in good.holds
    assert not good.killed


def test_one_that_cannot_take_it_back_is_ended() -> None:
    stuck = Site(0, keeps=True)
    with pytest.raises(AdapterError):
        asyncio.run(changes(stuck, Site(1, fails=AdapterError("damaged"))).add("new", FOLDER, DEFAULT))
    assert stuck.killed


def test_without_a_replica_nothing_changes() -> None:
    with pytest.raises(NotReady, match="nothing was changed"):
        asyncio.run(changes().add("new", FOLDER, DEFAULT))


def test_one_that_comes_again_gets_the_pool_as_it_is() -> None:
    async def run() -> None:
        first, later = Site(0), Site(0)
        changing = changes(first)
        changing.show(await changing.add("new", FOLDER, DEFAULT))
        await changing.remove("code")
        await changing.remove("law")
        changing.show(await changing.add("law", FOLDER, DEFAULT))  # another content under a name of the pool
        async with changing.applied_to(later):  # type: ignore[arg-type]
            assert later.holds == first.holds == {name: one.content_hash for name, one in NEW.items()}

    asyncio.run(run())


def test_one_that_finds_other_files_is_not_taken_in() -> None:
    async def run() -> None:
        changing, later = changes(Site(0)), Site(0)
        later.hello["experts"] = outlines([POOL["code"], random_adapter(SHAPES, 4, "law")])
        with pytest.raises(PoolsDiffer, match="'law'"):
            async with changing.applied_to(later):  # type: ignore[arg-type]
                pass
        gone = Site(1, fails=AdapterError("missing"))
        changing.show(await changing.add("new", FOLDER, DEFAULT))
        with pytest.raises(PoolsDiffer, match="'new' cannot be loaded again: missing"):
            async with changing.applied_to(gone):  # type: ignore[arg-type]
                pass

    asyncio.run(run())


def test_what_is_taken_out_stays_until_its_last_request_has_ended() -> None:
    async def run() -> None:
        site = Site(0)
        changing = changes(site)
        blend = Blend.of([("code", POOL["code"].content_hash, 1.0)])
        with changing.using(blend):
            with changing.using(blend):
                await changing.remove("code")
                assert "code" in site.holds
            assert "code" in site.holds
        await changing._sweeping
        assert "code" not in site.holds

    asyncio.run(run())
