"""What is written, loaded and unloaded, and when."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from loramux.adapters.errors import BlendError
from loramux.adapters.lora import LoraAdapter
from loramux.server.backend.errors import BackendError
from loramux.server.backend.folders import PREFIX, BlendFolders
from loramux.server.errors import StartError
from tests.backend_kit import (
    BASE,
    PROMPT,
    Behind,
    Run,
    loaded_at,
    written,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def test_a_blend_is_written_and_loaded_once_under_its_digest(run: Run) -> None:
    async def test(found: Behind) -> None:
        blends = [found.blend(a=0.5, b=0.5), found.blend(b=0.5, a=0.5)]
        answers = await asyncio.gather(*(found.ask(blend, PROMPT) for blend in blends * 4))
        assert len({tuple(answer.tokens) for answer in answers}) == 1
        (folder,) = written(found)
        assert found.fakes[0].calls == [("load", folder.name)]
        assert found.fakes[0].adapters == {folder.name: str(folder)}
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (16, 16, {})
        assert config["base_model_name_or_path"] == BASE
        async with found.residency.lease(blends[0]) as lease:
            assert (lease.cached, lease.rank, lease.method, lease.relative_error) == (True, 10, "exact", 0.0)
            assert lease.key == blends[0].key

    run(test)


def test_the_oldest_blend_is_unloaded_below_the_servers_number(run: Run) -> None:
    async def test(found: Behind) -> None:
        weights = [{"a": 1.0}, {"b": 1.0}, {"c": 1.0}, {"a": 0.5, "b": 0.5}]
        for one in weights[:2]:
            await found.ask(found.blend(**one))
        await found.ask(found.blend(a=1.0))  # now b is the oldest
        await found.ask(found.blend(**weights[2]))
        fake = found.fakes[0]
        assert [action for action, _ in fake.calls] == ["load", "load", "unload", "load"]
        assert fake.calls[2][1] == fake.calls[1][1]
        await asyncio.gather(*(found.ask(found.blend(**one)) for one in weights * 2))
        assert len(fake.adapters) == 2
        assert len(written(found)) == 4

    run(test, adapters=2)


def test_what_is_in_use_is_never_unloaded_and_the_rest_waits(run: Run) -> None:
    async def test(found: Behind) -> None:
        async with found.residency.lease(found.blend(a=1.0)):
            waiting = asyncio.create_task(found.ask(found.blend(b=1.0)))
            for _ in range(50):
                await asyncio.sleep(0.01)
            assert not waiting.done()
            assert len(found.fakes[0].adapters) == 1
        assert len((await waiting).tokens) == 4

    run(test, adapters=1)


def test_adapters_of_others_are_left_alone(run: Run, place: Path, servers: Any) -> None:
    fake = servers[0][0]
    fake._load("theirs", str(place / "experts" / "a"))

    async def test(found: Behind) -> None:
        await found.ask(found.blend(a=1.0))
        await found.ask(found.blend(b=1.0))
        assert "theirs" in fake.adapters
        assert len(fake.adapters) == 2

    run(test, adapters=2)

    async def full(found: Behind) -> None:
        with pytest.raises(BackendError, match="adapters are not loramux's"):
            await found.ask(found.blend(a=1.0))

    fake.adapters.pop(next(name for name in fake.adapters if name != "theirs"))
    run(full, adapters=1)


def test_directories_stay_below_their_limit_of_bytes(run: Run) -> None:
    async def test(found: Behind) -> None:
        await found.ask(found.blend(a=1.0))
        size = found.folders.nbytes
        found.residency._room = type(found.residency._room)((1, 8, 16, 32), 4, int(2.9 * size) + 2**16)
        for number in range(1, 6):
            await found.ask(found.blend(a=number / 8))
            held = sum(file.stat().st_size for folder in written(found) for file in folder.iterdir())
            assert held == found.folders.nbytes <= 2.9 * size + 2**16
        # What was deleted was unloaded before: the server could not read it again.
        assert set(found.fakes[0].adapters) <= {folder.name for folder in written(found)}
        assert found.residency.stats().evictions >= 2
        found.residency._room = type(found.residency._room)((1, 8, 16, 32), 4, 1000)
        with pytest.raises(BlendError, match=r"backend.bytes is 1000"):
            await found.ask(found.blend(b=0.25))

    run(test)


def test_a_wide_blend_is_approximated_or_refused(run: Run) -> None:
    async def approximate(found: Behind) -> None:
        async with found.residency.lease(found.blend(a=0.5, d=0.5)) as lease:
            assert (lease.method, lease.rank) == ("svd", 16)
            assert 0 < lease.relative_error < 1

    run(approximate, ranks=(1, 8, 16))

    async def refuse(found: Behind) -> None:
        with pytest.raises(BlendError, match="rank 24 and the backend takes 16"):
            await found.ask(found.blend(a=0.5, d=0.5))
        with pytest.raises(BlendError, match="expert 'wide' has rank 20"):
            found.residency.add_expert(LoraAdapter("wide", "hash", found.experts["d"].pairs))

    # The same folder: an approximation that was left there is not what may be answered now.
    run(refuse, ranks=(1, 8, 16), truncate=False)


def test_experts_come_and_go(run: Run) -> None:
    async def test(found: Behind) -> None:
        blend = found.blend(b=1.0)
        expert = found.experts["b"]
        found.residency.remove_expert("b")
        with pytest.raises(BlendError, match="'b' is not in the pool"):
            await found.ask(blend)
        with pytest.raises(BlendError, match="no expert 'b'"):
            found.residency.remove_expert("b")
        found.residency.add_expert(expert)
        with pytest.raises(BlendError, match="loaded already"):
            found.residency.add_expert(expert)
        assert len((await found.ask(blend)).tokens) == 4

    run(test)


def test_what_an_earlier_process_left_is_used(run: Run, tmp_path: Path) -> None:
    async def first(found: Behind) -> None:
        await found.ask(found.blend(a=0.5, b=0.5))
        unfinished = found.folders.root / ".writing-1"
        unfinished.mkdir()
        (found.folders.root / f"{PREFIX}{'ab' * 16}").mkdir()

    async def second(found: Behind) -> None:
        assert len(written(found)) == 1
        assert not list(found.folders.root.glob(".writing*"))
        async with found.residency.lease(found.blend(a=0.5, b=0.5)) as lease:
            assert (lease.cached, lease.rank) == (True, 10)
        assert len(loaded_at(found.fakes[0])) == 1

    run(first)
    run(second)


def test_a_folder_has_one_owner(tmp_path: Path) -> None:
    folders = BlendFolders(tmp_path / "blends")
    with pytest.raises(StartError, match="in use by another loramux"):
        BlendFolders(tmp_path / "blends")
    folders.close()
    BlendFolders(tmp_path / "blends").close()
    (tmp_path / "file").write_text("")
    with pytest.raises(StartError, match=r"backend\.folder"):
        BlendFolders(tmp_path / "file")
