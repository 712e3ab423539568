"""Commands that need no model do not import what runs one."""

import subprocess
import sys

from tests.kit import DEMO_POOL

HEAVY = ("torch", "transformers", "peft", "sentence_transformers")
POOL = str(DEMO_POOL)


def codes_without(modules: tuple[str, ...], *commands: list[str]) -> list[int]:
    """The exit codes of commands, one after the other in a fresh process, that must import none of the
    modules."""
    script = f"""
import contextlib, io, sys
from loramux.server.cli import main
codes = []
for arguments in {list(commands)!r}:
    sys.argv = ["loramux", *arguments]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            main()
        except SystemExit as end:
            codes.append(end.code or 0)
    found = [name for name in {modules!r} if name in sys.modules]
    assert not found, (arguments, found)
print(*codes)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return [int(code) for code in done.stdout.split()]


def test_what_comes_before_a_command_imports_next_to_nothing() -> None:
    light = (*HEAVY, "numpy", "rich", "uvicorn", "fastapi", "yaml", "pydantic_settings", "loramux.router")
    commands = [["--version"], ["version"], ["--completion", "bash"], ["--help"], ["nonsense"]]
    assert codes_without(light, *commands) == [0, 0, 0, 0, 2]


def test_reading_commands_do_not_import_the_engine() -> None:
    commands = [
        ["config"],
        ["pool", "list"],
        ["pool", "show", POOL],
        ["pool", "show", "--json", POOL],
        ["pool", "check", "--files", POOL],
        ["train", "lora", "--help"],
        ["serve", "--help"],
        # An encoder that is a transformer needs torch; a static one does not.
        ["route", "--pool", POOL, "find all txt files"],
    ]
    assert codes_without(HEAVY, *commands) == [0] * len(commands)


def test_mistakes_are_known_without_the_engine() -> None:
    usage = [
        ["route"],
        ["serve", "--set", "x"],
        ["serve", "--port", "many"],
        ["train", "lora", "--rank", "0"],
        ["pool", "build"],
        ["evaluate"],
    ]
    failures = [
        ["pool", "check", "/absent"],
        ["chat", "--url", "http://127.0.0.1:9"],
        ["config", "--set", "port=-1"],
        ["doctor", "--set", "port=-1"],
    ]
    assert codes_without(HEAVY, *usage, *failures) == [2] * len(usage) + [1] * len(failures)


def test_a_start_once_loaded_the_compiler_the_distributed_tensors_and_scipy() -> None:
    script = """
import sys
from loramux.server.light_imports import import_transformers
import_transformers()
import torch
import loramux.server.app
import loramux.server.assemble
import loramux.server.build
from transformers import LlamaConfig
from loramux.server.engine.model import skeleton
config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, vocab_size=9,
    num_attention_heads=2)
assert skeleton(config).lm_head.weight.is_meta
heavy = {
    "torch._dynamo", "sympy", "scipy", "torch.distributed.tensor", "sentence_transformers", "sklearn",
    "pandas", "peft", "bitsandbytes", "rich", "httpx", "loramux.server.backend.front",
    "loramux.server.replicas.build",
}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
# What was left out is there for those who ask for it.
assert torch.compiler.disable(len) is not len
assert torch.distributed.is_available() and torch._dynamo.__file__
from transformers import masking_utils
with masking_utils.TransformGetItemToIndex():
    pass
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_files_of_all_models_are_read_once() -> None:
    script = """
import sys
from loramux.server.light_imports import import_transformers
import transformers
from pathlib import Path
from transformers.utils import import_utils

read = []
one_folder = import_utils.create_import_structure_from_path
def noted(place):
    read.append(Path(place))
    return one_folder(place)
import_utils.create_import_structure_from_path = noted
define = import_utils.define_import_structure
import_transformers()
models = Path(transformers.__file__).with_name("models")
assert "transformers.models.auto" in sys.modules
assert not {models, models / "__init__.py"} & set(read), read
assert import_utils.define_import_structure is define
# It is as complete as by itself.
theirs = {}
for parts in define(models / "__init__.py").values():
    for name, found in parts.items():
        theirs.setdefault(name, set()).update(found)
ours = transformers.models._import_structure
assert {name: set(found) for name, found in ours.items()} == theirs
assert transformers.models.LlamaConfig is transformers.LlamaConfig
assert transformers.models.qwen3.Qwen3Config().model_type == "qwen3"
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
