"""What `loramux deploy ray` sends to other machines, and what it says where it cannot."""

import sys
from pathlib import Path

import pytest

from loramux.server.errors import StartError
from loramux.server.ray.deploy import connect, shipped
from loramux.server.ray.options import RayOptions
from loramux.server.settings import api_keys, load_settings


def test_settings_arrive_as_they_are(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("from-file\n")
    flags = {
        "replicas": 2,
        "admin_key": "admin",
        "api_keys": ["given"],
        "api_key_file": str(keys),
        "limits": {"max_n": 3},
    }
    settings = load_settings(flags=flags)
    sent = shipped(settings)
    keys.unlink()  # it is no file of the other machine
    there = RayOptions(settings=sent).load()
    assert api_keys(there) == ("given", "from-file")
    assert there.admin_key == settings.admin_key
    assert (there.replicas, there.limits) == (2, settings.limits)
    assert "pool" not in sent  # a default: the place of the installation there


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with pytest.raises(StartError, match=r"pip install 'loramux\[ray\]'"):
        connect(None, 1)
