"""pool.json: strict reading, confined paths, and files that no longer are what they were."""

import json
import random

import pytest

from loramux.server.pool.manifest import (
    BaseEntry,
    ExpertEntry,
    Manifest,
    PoolError,
    RouterEntry,
    hash_files,
    read_pool,
    verify,
    write_manifest,
)


@pytest.fixture
def pool(tmp_path):
    root = tmp_path / "pool"
    for name in ("base/config.json", "experts/tax/adapter_config.json", "router/router.json"):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(random.randbytes(200))
    manifest = Manifest(
        format="loramux-pool",
        version=1,
        name="mine",
        base=BaseEntry(id="tiny", path="base"),
        experts=(ExpertEntry(id="tax", path="experts/tax", rows=3, top_terms=("vat", "duty")),),
        router=RouterEntry(path="router"),
        sparse=(),
        files=hash_files(root),
    )
    write_manifest(root, manifest)
    return root


def change(root, **fields):
    record = json.loads((root / "pool.json").read_text())
    record.update(fields)
    (root / "pool.json").write_text(json.dumps(record))


def test_what_is_written_is_read_back(pool):
    read = read_pool(pool)
    assert read.manifest.experts[0].top_terms == ("vat", "duty")
    assert sorted(read.manifest.files) == [
        "base/config.json",
        "experts/tax/adapter_config.json",
        "router/router.json",
    ]
    assert read.base_location == str(pool / "base")
    assert read.router_dir == pool / "router"
    assert read.expert_dir(read.manifest.experts[0]) == pool / "experts/tax"
    assert verify(pool) == []


def test_every_kind_of_tampering_is_named(pool):
    config = pool / "base/config.json"
    whole = config.read_bytes()
    config.write_bytes(whole[:-1])
    assert verify(pool) == ["base/config.json: changed: its bytes do not match the hash in pool.json"]
    config.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert len(verify(pool)) == 1
    config.unlink()
    assert verify(pool) == ["base/config.json: missing"]
    config.write_bytes(whole)
    (pool / "router/extra.bin").write_bytes(b"x")
    assert verify(pool) == ["router/extra.bin: not listed in pool.json"]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"surprise": 1}, "surprise: unknown key"),
        ({"version": 2}, "version"),
        ({"format": "other"}, "format"),
        ({"name": 5}, "name"),
        ({"base": {"id": "tiny", "path": "base", "kind": "x"}}, r"base\.kind: unknown key"),
        ({"base": {"id": "tiny"}}, "base.path"),
        ({"experts": [{"id": "Tax Law", "path": "experts/tax"}]}, r"experts\.0\.id"),
        ({"experts": [{"id": "tax", "path": "experts/tax", "rows": -1}]}, r"experts\.0\.rows"),
        ({"experts": [{"id": "tax", "path": "a"}, {"id": "tax", "path": "b"}]}, "'tax' is used twice"),
        ({"experts": [{"id": "tiny", "path": "a"}]}, "'tiny' is used twice"),
        ({"experts": [{"id": "tax", "path": "../other"}]}, "leads out of the pool"),
        ({"experts": [{"id": "tax", "path": "/etc"}]}, "leads out of the pool"),
        ({"router": {"path": "../../x"}}, "leads out of the pool"),
        ({"base": {"id": "tiny", "path": "../base"}}, "leads out of the pool"),
        ({"files": {"../secret": "sha256:" + "0" * 64}}, "leads out of the pool"),
        ({"files": {"base/config.json": "md5:00"}}, "files"),
    ],
)
def test_a_wrong_manifest_names_file_and_key(pool, fields, why):
    change(pool, **fields)
    with pytest.raises(PoolError, match=why) as caught:
        read_pool(pool)
    assert str(caught.value).startswith(str(pool / "pool.json"))
    assert "\n" not in str(caught.value)


def test_malformed_and_missing_manifests_are_named(pool, tmp_path):
    (pool / "pool.json").write_text('{"format": ')
    with pytest.raises(PoolError, match="JSON"):
        read_pool(pool)
    with pytest.raises(PoolError, match=r"is .* a pool"):
        read_pool(tmp_path / "nowhere")


def test_a_link_out_of_the_pool_is_refused(pool, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (pool / "experts/link").symlink_to(outside)
    change(pool, experts=[{"id": "tax", "path": "experts/link"}])
    with pytest.raises(PoolError, match="leads out of the pool"):
        read_pool(pool)


def test_the_base_may_lie_elsewhere_by_the_operators_choice(pool, tmp_path):
    change(pool, base={"id": "tiny", "path": str(tmp_path)})
    assert read_pool(pool).base_location == str(tmp_path)
    change(pool, base={"id": "tiny", "path": "owner/name"})
    assert read_pool(pool).base_location == "owner/name"
    change(pool, base={"id": "tiny", "path": "gone"})
    with pytest.raises(PoolError, match="no directory of the pool"):
        _ = read_pool(pool).base_location
