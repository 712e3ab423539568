"""What the pool's report says of its experts, as the metrics have it."""

import json
from pathlib import Path

import pytest

from loramux.server.pool.build_report import read_gains
from loramux.server.pool.manifest import Pool, PoolError, read_pool
from tests.kit import DEMO_POOL


def with_report(tmp_path: Path, text: str) -> Pool:
    (tmp_path / "report.json").write_text(text)
    return Pool(tmp_path, read_pool(DEMO_POOL).manifest)


def test_every_expert_of_the_demo_pool_has_its_gain() -> None:
    pool = read_pool(DEMO_POOL)
    gains = read_gains(pool)
    assert set(gains) == {entry.id for entry in pool.manifest.experts}
    assert all(0 < gain < 1 for gain in gains.values())


def test_a_pool_without_a_report_and_an_expert_without_held_out_rows_have_none(tmp_path: Path) -> None:
    assert read_gains(Pool(tmp_path, read_pool(DEMO_POOL).manifest)) == {}
    lines = [
        {"id": "law", "base_loss": 2.0, "expert_loss": 2.25, "more": [1]},
        {"id": "few", "base_loss": None, "expert_loss": None},
        {"id": "added"},
    ]
    assert read_gains(with_report(tmp_path, json.dumps({"rows": 3, "experts": lines}))) == {"law": -0.25}


@pytest.mark.parametrize(
    "text", ["{", "{}", '{"experts": [{"id": 3}]}', '{"experts": [{"id": "a", "base_loss": "x"}]}']
)
def test_a_damaged_report_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(PoolError, match=r"report\.json: .*build the pool again or delete it"):
        read_gains(with_report(tmp_path, text))
