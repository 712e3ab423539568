"""A tiny base, random adapters and example texts on disk, and a pool of them."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.peft_format import write_lora
from tests.kit import byte_tokenizer
from tests.tiny import random_adapter, tiny_llama
from tests.unit.router.kit import TOPICS, topic_pairs, write_static_encoder

BASE = "tiny"


def write_base(folder: Path) -> Path:
    """A random Llama that reads bytes, with a chat template."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_adapter(folder: Path, name: str, rank: int = 4, base: str = BASE) -> Path:
    """A PEFT folder that fits `write_base`."""
    shapes = BaseShapes.from_model(tiny_llama(vocab_size=len(byte_tokenizer())), base)
    write_lora(random_adapter(shapes, rank, name, 0.05), folder, base)
    return folder


def topic_texts(topic: str, count: int, seed: int = 1) -> list[str]:
    """Texts about one of the topics of the router's tests."""
    pairs, labels = topic_pairs(count * len(TOPICS), seed)
    return [text for (text, _), label in zip(pairs, labels, strict=True) if list(TOPICS)[label] == topic]


def write_encoder(folder: Path) -> Path:
    """A static encoder that knows the words of all topics."""
    return write_static_encoder(folder, [text for (text, _) in topic_pairs(400, 1)[0]], dimension=48)


@contextmanager
def installed(site: Path, module: str, distribution: str, version: str) -> Iterator[Path]:
    """An installed package without code; yields its folder, which is to be filled."""
    folder = site / module
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "__init__.py").touch()
    info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    sys.path.insert(0, str(site))
    try:
        yield folder
    finally:
        sys.path.remove(str(site))
        sys.path_importer_cache.pop(str(site), None)
