"""What a pool says about its experts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from loramux.server.pool.build_report import REPORT
from loramux.server.pool.facts import ExpertFacts, read_facts
from loramux.server.pool.manifest import Pool, PoolError, read_pool
from loramux.server.pool.routing import load_pool_router
from loramux.server.settings import DEMO_POOL, load_settings


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    """The demo pool's manifest over an empty folder."""
    return replace(read_pool(DEMO_POOL), root=tmp_path)


def test_without_a_report_there_are_the_words_of_the_manifest(pool: Pool) -> None:
    facts = read_facts(pool)["select-table"]
    assert facts.rows == 18467
    assert facts.top_terms[:2] == ("select", "table")
    assert (facts.base_loss, facts.expert_loss, facts.gain, facts.routed) == (None, None, None, None)


def test_the_report_gives_losses_and_the_gain(pool: Pool) -> None:
    line = json.loads((DEMO_POOL / REPORT).read_text())["experts"][0]
    facts = read_facts(read_pool(DEMO_POOL))[line["id"]]
    assert facts.base_loss == line["base_loss"]
    assert facts.gain == pytest.approx((line["base_loss"] - line["expert_loss"]) / line["base_loss"])
    assert ExpertFacts(base_loss=2.0, expert_loss=3.0).gain == -0.5
    assert ExpertFacts(base_loss=0.0, expert_loss=3.0).gain is None


@pytest.mark.parametrize(
    ("text", "named"), [("{", "content"), ("[]", "content"), ('{"rows": "many"}', "rows")]
)
def test_a_report_that_is_none_stops_the_start(pool: Pool, text: str, named: str) -> None:
    (pool.root / REPORT).write_text(text)
    with pytest.raises(PoolError, match=rf"report\.json: {named}"):
        read_facts(pool)


def test_every_example_of_the_demo_pool_is_routed_to_its_expert() -> None:
    settings = load_settings()
    pool = read_pool(settings.pool)
    router = load_pool_router(settings, pool)
    facts = read_facts(pool)
    asked = [(id, text) for id, fact in facts.items() for text in fact.examples]
    decisions = router.decide([text for _, text in asked])
    assert {id for id, _ in asked} == set(facts)
    assert [(id, text) for (id, text), one in zip(asked, decisions, strict=True)
            if one.fallback or one.experts[0].id != id] == []  # fmt: skip
