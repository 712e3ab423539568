"""`loramux doctor` with backends: each thing that can be wrong with them is named with what to do."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from loramux.server.backend.folders import BlendFolders
from loramux.server.cli import app
from tests.fake_vllm import FakeVllm, listening
from tests.kit import DEMO_POOL

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
#: Nobody listens there.
NOBODY = "http://127.0.0.1:9"
Findings = list[dict[str, Any]]


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[FakeVllm, str]]:
    fake = FakeVllm(DEMO_POOL / "base")
    with listening(fake) as url:
        yield fake, url


@pytest.fixture
def server(running: tuple[FakeVllm, str]) -> Iterator[tuple[FakeVllm, str]]:
    """As it was started, whatever a test makes of it."""
    fake = running[0]
    kept = {name: getattr(fake, name) for name in ("name", "root", "key", "updating", "max_lora_rank")}
    fake.calls.clear()
    yield running
    vars(fake).update(kept)


def examined(place: Path, *urls: str, code: int, **chosen: Any) -> Findings:
    given = {"port": 0, "backend.folder": place / "blends", "backend.max_lora_rank": 32, **chosen}
    flags = [part for name, value in given.items() for part in ("--set", f"{name}={value}")]
    named = [part for url in urls for part in ("--backend", url)]
    result = CliRunner().invoke(app, ["doctor", "--pool", str(DEMO_POOL), *named, *flags, "--json"])
    assert result.exit_code == code, result.output
    found: Findings = json.loads(result.stdout)["findings"]
    return found


def told(findings: Findings, name: str) -> list[tuple[str, str, str]]:
    return [(one["level"], one["text"], one.get("advice", "")) for one in findings if one["name"] == name]


def test_a_sound_backend(server: tuple[FakeVllm, str], tmp_path: Path) -> None:
    fake, url = server
    findings = examined(tmp_path, url, code=0)
    ((level, text, _),) = told(findings, "backend")
    assert level == "ok"
    assert text == (
        f"{url}: vllm 0.33.0, base loramux-demo-base, 1024 tokens of context, 0 adapters loaded; "
        "takes adapters of rank 32"
    )
    assert [action for action, _ in fake.calls] == ["load", "unload"] * 2
    assert not fake.adapters
    assert told(findings, "ranks")[0][0] == "ok"
    # What this process would need to generate is not looked at; what nobody serves there is told.
    assert not {"device", "kernels", "threads", "memory"} & {one["name"] for one in findings}
    assert {level for level, *_ in told(findings, "sparse")} == {"warning"}
    assert "no backend knows" in told(findings, "sparse")[0][1]


def test_one_that_is_down_is_a_warning_beside_one_that_answers(
    server: tuple[FakeVllm, str], tmp_path: Path
) -> None:
    advice = "start it, or take it out of backend.urls"
    up, down = told(examined(tmp_path, server[1], NOBODY, code=0), "backend")
    assert (up[0], down[0], down[2]) == ("ok", "warning", advice)
    assert f"backend {NOBODY}: " in down[1]
    ((level, _, way),) = told(examined(tmp_path, NOBODY, code=1), "backend")
    assert (level, way) == ("problem", advice)


@pytest.mark.parametrize(
    ("fields", "text", "advice"),
    [
        ({"name": "x", "root": "/models/x"}, "the pool is for 'loramux-demo-base'", "--served-model-name"),
        ({"key": "secret"}, "answered 401", "backend.api_key"),
        ({"updating": False}, "answered 404", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora"),
        ({"max_lora_rank": 16}, "rank 32 is greater than", "set backend.max_lora_rank to its"),
    ],
    ids=["another base", "key", "no LoRA", "ranks"],
)
def test_what_will_not_do(
    server: tuple[FakeVllm, str], tmp_path: Path, fields: dict[str, Any], text: str, advice: str
) -> None:
    vars(server[0]).update(fields)
    ((level, said, way),) = told(examined(tmp_path, server[1], code=1), "backend")
    assert level == "problem"
    assert text in said
    assert advice in way


def test_blends_that_will_not_be_exact(server: tuple[FakeVllm, str], tmp_path: Path) -> None:
    narrow = {"backend.max_lora_rank": 8}
    ((level, text, advice),) = told(examined(tmp_path, server[1], code=0, **narrow), "ranks")
    assert level == "warning"
    assert "have rank up to 24 and the backends take 8: such a blend is approximated" in text
    assert "--max-lora-rank 32" in advice
    refused = {"backend.max_lora_rank": 1, "backend.too_wide": "refuse"}
    found = told(examined(tmp_path, server[1], code=1, **refused), "ranks")
    assert ("problem", "has rank 8 and the backends take 1") in {
        (level, text[text.index("has rank") : text.index(";")]) for level, text, _ in found[:-1]
    }


def test_a_folder_that_a_running_loramux_has(server: tuple[FakeVllm, str], tmp_path: Path) -> None:
    folders = BlendFolders(tmp_path / "blends")
    try:
        findings = examined(tmp_path, server[1], code=0)
    finally:
        folders.close()
    ((level, text, _),) = told(findings, "folder")
    assert level == "note"
    assert "in use by another loramux" in text
    assert told(findings, "backend")[0][1].endswith("adapters were not tried")
    assert not server[0].calls


@pytest.mark.parametrize(
    ("chosen", "text"),
    [
        ({"routing.strategy": "arrow"}, "routing.strategy arrow asks the experts"),
        ({"replicas": 2}, "set either replicas or backend.urls"),
    ],
)
def test_settings_that_no_backend_can_serve(
    server: tuple[FakeVllm, str], tmp_path: Path, chosen: dict[str, Any], text: str
) -> None:
    ((level, said, _),) = told(examined(tmp_path, server[1], code=1, **chosen), "settings")
    assert level == "problem"
    assert text in said


def test_a_folder_that_cannot_be_made(server: tuple[FakeVllm, str], tmp_path: Path) -> None:
    (tmp_path / "blends").write_text("a file")
    ((level, _, advice),) = told(examined(tmp_path, server[1], code=1), "folder")
    assert level == "problem"
    assert "backend.folder" in advice
