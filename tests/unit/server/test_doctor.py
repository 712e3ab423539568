"""`loramux doctor`: sound here, and each thing that can be wrong is named with what to do."""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from loramux.kernels.pointwise import library
from loramux.server.cli import app
from loramux.server.doctor import machine as machine_module
from loramux.server.doctor import software as software_module
from loramux.server.doctor.finding import Finding, Level
from loramux.server.pool.manifest import hash_files, read_pool, write_manifest
from tests.kit import DEMO_POOL


def examined(*arguments: str, code: int) -> list[dict[str, Any]]:
    result = CliRunner().invoke(app, ["doctor", "--set", "port=0", *arguments, "--json"])
    assert result.exit_code == code, result.output
    report = json.loads(result.stdout)
    assert report["ok"] == (code == 0)
    found: list[dict[str, Any]] = report["findings"]
    return found


def levels(findings: list[dict[str, Any]], name: str) -> set[str]:
    return {one["level"] for one in findings if one["name"] == name}


def problems(findings: list[dict[str, Any]]) -> list[str]:
    return [f"{one['text']} -> {one.get('advice', '')}" for one in findings if one["level"] == "problem"]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return shutil.copytree(DEMO_POOL, tmp_path / "pool")


def sealed(root: Path) -> None:
    """Make the manifest agree with what the files are now."""
    from dataclasses import replace

    write_manifest(root, replace(read_pool(root).manifest, files=hash_files(root)))


def test_a_sound_pool_has_no_problem() -> None:
    findings = examined("--pool", str(DEMO_POOL), code=0)
    names = {one["name"] for one in findings}
    assert names >= {"release", "packages", "device", "kernels", "port", "pool", "router", "base", "experts"}
    [memory] = [one for one in findings if one["name"] == "memory"]
    numbers = memory["numbers"]
    assert numbers["kv_tokens"] > 0
    assert 0 < numbers["base"] + numbers["kv"] < numbers["free"]
    assert "12 of 12 can be served" in {one["text"] for one in findings if one["name"] == "experts"}


def test_the_same_for_people() -> None:
    result = CliRunner().invoke(app, ["doctor", "--pool", str(DEMO_POOL), "--set", "port=0"])
    assert result.exit_code == 0
    assert "nothing keeps the server from starting" in result.stdout
    assert "kv_tokens" not in result.stdout  # numbers are for programs


def test_the_compiled_kernels_are_told_with_the_instruction_set() -> None:
    [kernels] = [one for one in examined("--pool", str(DEMO_POOL), code=0) if one["name"] == "kernels"]
    if library() is None:
        assert kernels["level"] == "warning"
        assert "g++" in kernels["advice"]
    else:
        assert any(name in kernels["text"] for name in ("BASELINE", "AVX2", "AVX512", "AMX"))


def test_an_expert_that_does_nothing_is_named(copy: Path) -> None:
    first, second = read_pool(copy).manifest.experts[:2]
    for entry, untouched in ((first, 0), (second, 2)):
        file = copy / entry.path / "adapter_model.safetensors"
        tensors = load_file(file)
        for name in sorted(name for name in tensors if "lora_B" in name)[untouched:]:
            tensors[name] = torch.zeros_like(tensors[name])
        save_file(tensors, file)
    sealed(copy)
    findings = examined("--pool", str(copy), code=1)
    [problem] = problems(findings)
    assert problem.startswith(f"{first.id}: ")
    assert "untrained" in problem
    assert f"loramux pool remove {copy} --id {first.id}" in problem
    [note] = [one["text"] for one in findings if one["name"] == "experts" and one["level"] == "note"]
    assert note.startswith(f"{second.id}: ")
    assert "do nothing" in note


def test_a_changed_file_and_a_missing_pool(copy: Path, tmp_path: Path) -> None:
    (copy / "report.json").write_text("{}")
    [problem] = problems(examined("--pool", str(copy), code=1))[:1]
    assert problem.startswith("report.json: changed")
    assert levels(examined("--pool", str(copy), "--set", "verify_pool=false", code=1), "pool") == {"warning"}
    [problem] = problems(examined("--pool", str(tmp_path), code=1))
    assert "loramux pool list" in problem


def test_another_encoder_than_the_routers(tmp_path: Path) -> None:
    """One with the same dimension: only its content tells it apart."""
    encoder = shutil.copytree(DEMO_POOL / "router/encoder", tmp_path / "encoder")
    [file] = encoder.glob("*.safetensors")
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)
    findings = examined("--pool", str(DEMO_POOL), "--set", f"encoder={encoder}", code=1)
    [problem] = problems(findings)
    assert "the centroids were made with" in problem
    assert "leave the setting `encoder` out" in problem
    assert levels(findings, "memory") == {"ok"}


def test_too_little_memory_says_which_setting_to_lower() -> None:
    findings = examined("--pool", str(DEMO_POOL), "--set", "engine.kv_tokens=100000000", code=1)
    [problem] = problems(findings)
    assert "engine.kv_tokens at most" in problem


def test_a_wheel_that_is_not_installed(copy: Path) -> None:
    file = copy / "pool.json"
    content = json.loads(file.read_text())
    content["base"] |= {"path": "no_such_base", "wheel": "no-such-base==1.2"}
    file.write_text(json.dumps(content))
    found = problems(examined("--pool", str(copy), code=1))
    assert found[0] == "no-such-base==1.2 is not installed -> pip install --no-deps no-such-base==1.2"


def hang_up(listener: socket.socket) -> None:
    """Some program that speaks no HTTP."""
    listener.accept()[0].close()


def test_a_taken_port() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        Thread(target=hang_up, args=(taken,), daemon=True).start()
        findings = examined("--pool", "/absent", "--set", f"port={port}", code=1)
    assert f"port {port}" in problems(findings)[0]
    assert "--port" in problems(findings)[0]


def test_a_device_that_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "device 'cuda'" in problems(examined("--pool", "/absent", "--set", "device=cuda", code=1))[0]


def test_packages_are_judged_by_what_the_release_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    judged: Callable[[Requirement], Finding | None] = software_module._judged
    old = judged(Requirement("torch<2"))
    assert old is not None
    assert old.level is Level.PROBLEM
    assert old.advice == "pip install 'torch<2'"
    missing = judged(Requirement("no-such-package>=1"))
    assert missing is not None
    assert missing.text == "no-such-package is not installed"
    assert judged(Requirement("torch>=2")) is None
    assert judged(Requirement("no-such-package; extra == 'test'")) is None


@pytest.mark.parametrize(("text", "cores"), [("max 100000", None), ("250000 100000", 3), ("5000 100000", 1)])
def test_a_containers_limit_of_cores(tmp_path: Path, text: str, cores: int | None) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(f"{text}\n")
    assert machine_module.allowed_cores(file) == cores
    assert machine_module.allowed_cores(tmp_path / "absent") is None
