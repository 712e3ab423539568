"""A pool of any number of small experts on the demo pool's base, each with words that only it is about."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load

from loramux.adapters.adapter_files import CONFIG_FILE, TENSOR_FILE
from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.lora import LoraAdapter, LoraPair
from loramux.adapters.peft_format import write_lora
from loramux.router.decision import STRATEGIES
from loramux.router.encoder import Encoder
from loramux.router.encoder_files import read_tokenizer
from loramux.router.familiarity import Familiarity
from loramux.router.fit.clusters import centroids
from loramux.router.fit.discriminant import fit_discriminant
from loramux.router.state import Calibration, RouterState
from loramux.router.store import load_state, save_router
from loramux.server.pool.manifest import (
    BaseEntry,
    ExpertEntry,
    Manifest,
    RouterEntry,
    hash_file,
    read_pool,
    write_manifest,
)
from tests.kit import DEMO_POOL

#: Words that a text of an expert is made of, of the words that are the expert's own.
TEXT_WORDS, OWN_WORDS = 4, 5
#: Bytes of the numbers of an expert are a stretch of this many random ones, each expert's its own.
NOISE = 1 << 20


@dataclass(frozen=True)
class BigPool:
    """Where it is, and what its experts are about: words [experts, OWN_WORDS]."""

    root: Path
    names: tuple[str, ...]
    words: npt.NDArray[np.str_]

    def text(self, expert: int, generator: np.random.Generator) -> str:
        """A text that belongs to an expert: some of its words, in any order."""
        return " ".join(generator.choice(self.words[expert], TEXT_WORDS, replace=False))


def write_big_pool(root: Path, count: int, *, rank: int = 2, seed: int = 0, layers: int = 6) -> BigPool:
    """Make the pool; a pool of 10,000 experts of rank 2 takes a gigabyte.

    Experts adapt every linear module of the first `layers` layers. They have no training behind them: their
    numbers are noise, small enough that answers stay text. Their configs are one file, linked.
    """
    demo = read_pool(DEMO_POOL)
    generator = np.random.default_rng(seed)
    names = tuple(f"expert-{number:05}" for number in range(count))
    router = root / "router"
    router.mkdir(parents=True)
    shutil.copytree(demo.router_dir / "encoder", router / "encoder")
    words = _words(router / "encoder" / "tokenizer.json", count, generator)
    pool = BigPool(root, names, words)
    save_router(_fitted(pool, generator), router)
    files = {
        path.relative_to(root).as_posix(): hash_file(path) for path in router.rglob("*") if path.is_file()
    }
    files |= _write_experts(pool, rank, layers, generator)
    entries = tuple(
        ExpertEntry(
            id=name, path=f"experts/{name}", description=f"About {' '.join(words[n])}", rows=TEXT_WORDS
        )
        for n, name in enumerate(names)
    )
    base = BaseEntry(id=demo.manifest.base.id, path=demo.base_location)
    write_manifest(
        root,
        Manifest("loramux-pool", 1, f"big-{count}", base, entries, RouterEntry("router"), (), files),
    )
    return pool


def _words(tokenizer: Path, count: int, generator: np.random.Generator) -> npt.NDArray[np.str_]:
    """Words of the encoder's vocabulary [count, OWN_WORDS], so that it tells them apart."""
    vocabulary = read_tokenizer(tokenizer).get_vocab()
    known = np.array(sorted({word for word in map(_plain, vocabulary) if len(word) > 3}))
    return np.stack([generator.choice(known, OWN_WORDS, replace=False) for _ in range(count)])


def _plain(token: str) -> str:
    bare = token.lstrip("Ġ▁ ")
    return bare if bare != token and bare.isascii() and bare.isalpha() and bare.islower() else ""


def _fitted(pool: BigPool, generator: np.random.Generator) -> RouterState:
    """In closed form: a calibration compares every row with every expert, which is too much here."""
    demo = load_state(DEMO_POOL / "router")
    encoder = Encoder.load(pool.root / "router" / "encoder", prefix=demo.encoder.prefix)
    texts = [pool.text(n, generator) for n in range(len(pool.names)) for _ in range(TEXT_WORDS)]
    vectors = encoder.encode(texts).vectors
    labels = np.repeat(np.arange(len(pool.names)), TEXT_WORDS)
    fitted = fit_discriminant(vectors, labels, len(pool.names), 0.5)
    return RouterState(
        experts=pool.names,
        encoder=encoder.spec,
        centroids=centroids(vectors, labels, len(pool.names)),
        corpus_mean=vectors.mean(axis=0),
        classifier=fitted.head().cooled(8.0),
        calibration={strategy: Calibration(0.05, 0.2) for strategy in STRATEGIES},
        familiarity=Familiarity(fitted.means, fitted.precision, 400.0, 40.0),
    )


def _write_experts(pool: BigPool, rank: int, layers: int, generator: np.random.Generator) -> dict[str, Any]:
    """The folders; their hashes by path. The header of the tensors is the same in every file."""
    shapes = BaseShapes.from_config_dir(DEMO_POOL / "base", read_pool(DEMO_POOL).manifest.base.id)
    modules = [m for m in shapes.modules if int(m.split(".")[2]) < layers]
    pairs = {
        module: LoraPair(
            torch.zeros(rank, shapes.modules[module][1], dtype=torch.float16),
            torch.zeros(shapes.modules[module][0], rank, dtype=torch.float16),
            1.0,
        )
        for module in modules
    }
    first = pool.root / "experts" / pool.names[0]
    write_lora(LoraAdapter("template", "", pairs), first, shapes.id)
    template = (first / TENSOR_FILE).read_bytes()
    (first / TENSOR_FILE).unlink()
    numbers = sum(tensor.numel() for tensor in load(template).values())
    header = template[: len(template) - 2 * numbers]
    noise = (generator.normal(size=NOISE) * 0.02).astype(np.float16)
    starts = generator.choice(NOISE - numbers, len(pool.names), replace=False)
    config_hash = hash_file(first / CONFIG_FILE)
    files = {}
    for name, start in zip(pool.names, starts, strict=True):
        folder = pool.root / "experts" / name
        folder.mkdir(exist_ok=True)
        if folder != first:
            (folder / CONFIG_FILE).hardlink_to(first / CONFIG_FILE)
        (folder / TENSOR_FILE).write_bytes(header + noise[start : start + numbers].tobytes())
        files[f"experts/{name}/{CONFIG_FILE}"] = config_hash
        files[f"experts/{name}/{TENSOR_FILE}"] = hash_file(folder / TENSOR_FILE)
    return files
