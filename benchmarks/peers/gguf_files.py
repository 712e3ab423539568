"""The pool that ships as loramux and llama.cpp read it: one GGUF file, experts in both formats, prompts.

The experts are converted by llama.cpp's own script, once, into the folder `gguf` of the cache. There is also
a copy of the base in bfloat16, of the numbers that the file's blocks stand for.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from tokenizers import Tokenizer

from benchmarks.prompts import stream
from loramux.server.base_files import BaseFiles
from loramux.server.pool.manifest import Pool, read_pool
from loramux.server.settings import DEFAULT_POOL

from .client import Mixture
from .files import PROMPT_TOKENS, Prompt

#: Of the ten experts, those that are asked for.
ADAPTERS = 8
BLEND_WEIGHTS = (0.6, 0.4)


@dataclass(frozen=True)
class GgufFiles:
    """Where everything is.

    Attributes:
        pool: the pool that ships.
        gguf: the file of its base.
        folder: the model folder that loramux makes of that file.
        bfloat16: such a folder with weights in bfloat16.
        loras: expert -> its adapter as GGUF; empty where nobody asks for them.
    """

    pool: Pool
    gguf: Path
    folder: Path
    bfloat16: Path
    loras: dict[str, Path]

    @property
    def base_id(self) -> str:
        return self.pool.manifest.base.id

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(str(self.folder / "tokenizer.json"))

    def mixtures(self, kind: str, requests: int) -> list[Mixture]:
        """The mixture of every request: the base, one of eight adapters, or one of eight blends of two."""
        names = [expert.id for expert in self.pool.manifest.experts][:ADAPTERS]
        if kind == "base":
            return [()] * requests
        if kind == "adapters":
            return [((names[i % ADAPTERS], 1.0),) for i in range(requests)]
        pairs = [(names[i % ADAPTERS], names[(i + 3) % ADAPTERS]) for i in range(requests)]
        return [tuple(zip(pair, BLEND_WEIGHTS, strict=True)) for pair in pairs]


def make_gguf_files(cache: Path, llama_cpp: Path | None) -> GgufFiles:
    """Find the base and convert what is missing.

    Args:
        cache: folder for what is made.
        llama_cpp: its sources; None converts nothing.

    Raises:
        StartError: the wheel of the base is not installed.
        CalledProcessError: an expert could not be converted.
    """
    pool = read_pool(DEFAULT_POOL)
    base = BaseFiles.locate(pool.base_location, content=pool.base_content)
    assert base.gguf is not None
    folder, made = Path(base.folder), cache / "gguf"
    made.mkdir(parents=True, exist_ok=True)
    loras: dict[str, Path] = {}
    missing: list[tuple[Path, Path]] = []
    for expert in pool.manifest.experts if llama_cpp is not None else ():
        source = pool.expert_dir(expert)
        digest = hashlib.sha256((source / "adapter_model.safetensors").read_bytes()).hexdigest()
        loras[expert.id] = made / f"{expert.id}-{digest[:12]}.gguf"
        if not loras[expert.id].is_file():
            missing.append((source, loras[expert.id]))
    if llama_cpp is not None and missing:
        _convert(llama_cpp, folder, missing)
    return GgufFiles(pool, base.gguf, folder, _in_bfloat16(base, made), loras)


#: The script once for each adapter, in one process: most of its time is imports.
_CONVERT = """
import runpy, sys
script, base, *files = sys.argv[1:]
sys.path.insert(0, script.rpartition("/")[0])
for adapter, target in zip(files[::2], files[1::2], strict=True):
    sys.argv = [script, "--base", base, "--outfile", target, adapter]
    runpy.run_path(script, run_name="__main__")
"""


def _convert(llama_cpp: Path, base: Path, adapters: Sequence[tuple[Path, Path]]) -> None:
    """Folders to files; the script takes shapes from the base's config, and writes float32 by default."""
    script = llama_cpp / "convert_lora_to_gguf.py"
    partial = [(source, target.with_suffix(".partial")) for source, target in adapters]
    files = [file for pair in partial for file in pair]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _CONVERT, script, base, *files]
    subprocess.run(command, check=True, capture_output=True, env=environment)  # noqa: S603
    for _, target in adapters:
        target.with_suffix(".partial").rename(target)


def _in_bfloat16(base: BaseFiles, made: Path) -> Path:
    import torch

    target = made / f"base-bfloat16-{str(base.content)[:12]}"
    weights = base.weights()
    if target.is_dir() or weights is None:
        return target
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    # Without what says that it is the GGUF file, since it is that no more.
    ignored = shutil.ignore_patterns("*.safetensors", "gguf_source.json")
    shutil.copytree(base.folder, partial, ignore=ignored)
    # float16 holds more digits than bfloat16 does, so the numbers are rounded, not only copied.
    values = {name: weights.value(name, torch.float32).to(torch.bfloat16) for name in weights.shapes}
    save_file(values, partial / "model.safetensors", metadata={"format": "pt"})
    partial.rename(target)
    return target


def natural_prompts(tokenizer: Tokenizer, count: int, seed: int) -> list[Prompt]:
    """Prompts of `PROMPT_TOKENS` tokens out of questions like the pool's; other seeds give others."""
    found: list[Prompt] = []
    questions = iter(stream(6 * count, seed))
    while len(found) < count:
        text = f"{next(questions)} {next(questions)} {next(questions)}"
        ids = tokenizer.encode(text).ids[:PROMPT_TOKENS]
        text = tokenizer.decode(ids)
        if len(ids) == PROMPT_TOKENS and tokenizer.encode(text).ids == ids:
            found.append(Prompt(text, ids))
    return found
