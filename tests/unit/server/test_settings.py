import os
from pathlib import Path

import pytest

from loramux.server.errors import StartError
from loramux.server.settings import DEFAULT_POOL, Settings, api_keys, load_settings


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("LORAMUX_"):
            monkeypatch.delenv(name)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "loramux.yaml"
    path.write_text(text)
    return path


def test_defaults() -> None:
    settings = load_settings()
    assert settings == Settings()
    assert settings.pool == DEFAULT_POOL
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)


def test_flag_over_environment_over_file_over_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path, "port: 1\nhost: file\nlimits: {max_n: 1, max_stop: 1, max_prompts: 1}\n")
    monkeypatch.setenv("LORAMUX_HOST", "env")
    monkeypatch.setenv("LORAMUX_LIMITS__MAX_N", "2")
    monkeypatch.setenv("LORAMUX_LIMITS__MAX_STOP", "2")
    settings = load_settings(file, {"limits": {"max_stop": 3}})
    assert (settings.port, settings.host) == (1, "env")
    limits = settings.limits
    assert (limits.max_prompts, limits.max_n, limits.max_stop) == (1, 2, 3)
    assert limits.max_top_logprobs == Settings().limits.max_top_logprobs


def test_the_file_may_be_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAMUX_CONFIG", str(written(tmp_path, "port: 77")))
    assert load_settings().port == 77


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("prot: 1", "'prot'"),
        ("limits: {max_m: 1}", "'limits.max_m'"),
        ("port: high", "'port'"),
        ("port: 70000", "'port'"),
        ("engine: 3", "'engine'"),
        ("quantization: int3", "'quantization'"),
        ("routing: {merge: mix}", "'routing.merge'"),
        ("admin_key: ''", "'admin_key'"),
        ("- a", "must be a mapping"),
        ("{", "not YAML"),
    ],
)
def test_a_bad_file_stops_the_start_with_one_line_that_names_the_key(
    tmp_path: Path, text: str, named: str
) -> None:
    with pytest.raises(StartError) as caught:
        load_settings(written(tmp_path, text))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"absent\.yaml"):
        load_settings(tmp_path / "absent.yaml")


def test_unknown_variables_stop_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAMUX_PROT", "1")
    with pytest.raises(StartError, match="LORAMUX_PROT"):
        load_settings()


def test_unknown_flags_stop_the_start() -> None:
    with pytest.raises(StartError, match=r"'limits\.max_m'"):
        load_settings(flags={"limits": {"max_m": 1}})


def test_keys_come_from_a_list_the_environment_and_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# ours\nthree\n\n four \n")
    monkeypatch.setenv("LORAMUX_API_KEYS", "first-key, second-key")
    settings = load_settings(flags={"api_key_file": keys})
    assert api_keys(settings) == ("first-key", "second-key", "three", "four")
    assert "three" not in repr(settings)
    assert "first-key" not in repr(settings)


def test_a_key_file_without_keys_stops_the_start(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# none\n")
    with pytest.raises(StartError, match="holds no key"):
        api_keys(load_settings(flags={"api_key_file": keys}))


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_settings().port = 1
