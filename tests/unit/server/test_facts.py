"""What a pool says about its experts, as the metrics and `/v1/experts` have it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from loramux.server.pool.build_report import REPORT
from loramux.server.pool.facts import read_facts
from loramux.server.pool.manifest import Pool, PoolError, read_pool
from loramux.server.pool.routing import load_pool_router
from loramux.server.settings import load_settings
from tests.kit import DEMO_POOL


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    """The demo pool's manifest over an empty folder."""
    return replace(read_pool(DEMO_POOL), root=tmp_path)


def test_every_expert_of_the_demo_pool_has_its_gain() -> None:
    pool = read_pool(DEMO_POOL)
    facts = read_facts(pool)
    assert set(facts) == {entry.id for entry in pool.manifest.experts}
    line = json.loads((DEMO_POOL / REPORT).read_text())["experts"][0]
    measured = facts[line["id"]].measured
    assert (measured.base_loss, measured.routed) == (line["base_loss"], line["routed"])
    assert measured.gain == line["base_loss"] - line["expert_loss"]
    assert all(0 < fact.measured.gain < 1 for fact in facts.values() if fact.measured.gain is not None)


def test_without_a_report_there_are_the_words_of_the_manifest(pool: Pool) -> None:
    facts = read_facts(pool)["select-table"]
    assert facts.rows == 18467
    assert facts.top_terms[:2] == ("select", "table")
    measured = facts.measured
    assert (measured.base_loss, measured.expert_loss, measured.gain, measured.routed) == (None,) * 4


def test_an_expert_without_held_out_rows_has_no_gain(pool: Pool) -> None:
    lines = [
        {"id": "select-table", "base_loss": 2.0, "expert_loss": 2.25, "more": [1]},
        {"id": "movie-song", "base_loss": None, "expert_loss": None},
        {"id": "true-false"},
    ]
    (pool.root / REPORT).write_text(json.dumps({"rows": 3, "experts": lines}))
    facts = read_facts(pool)
    assert {id: fact.measured.gain for id, fact in facts.items() if fact.measured.gain is not None} == {
        "select-table": -0.25
    }


@pytest.mark.parametrize(
    "text", ["{", "{}", '{"experts": [{"id": 3}]}', '{"experts": [{"id": "a", "base_loss": "x"}]}']
)
def test_a_damaged_report_is_named(pool: Pool, text: str) -> None:
    (pool.root / REPORT).write_text(text)
    with pytest.raises(PoolError, match=r"report\.json: .*build the pool again or delete it"):
        read_facts(pool)


def test_every_example_of_the_demo_pool_is_routed_to_its_expert() -> None:
    pool = read_pool(DEMO_POOL)
    router = load_pool_router(load_settings(flags={"pool": DEMO_POOL}), pool)
    asked = [(id, text) for id, fact in read_facts(pool).items() for text in fact.examples]
    decisions = router.decide([text for _, text in asked])
    assert {id for id, _ in asked} == {entry.id for entry in pool.manifest.experts}
    missed = [
        (id, text)
        for (id, text), one in zip(asked, decisions, strict=True)
        if one.fallback or one.experts[0].id != id
    ]
    assert missed == []
