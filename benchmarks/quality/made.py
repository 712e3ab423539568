"""Base, encoders and texts of the setting `tiny`, made on the spot: random weights, words of four topics."""

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from transformers import BertModel

from benchmarks.quality.setting import Setting
from tests.pool_kit import write_base, write_encoder
from tests.unit.router.bert import config, wordpiece
from tests.unit.router.kit import TOPICS, topic_pairs

TRAIN, TEST = 400, 80


def put(setting: Setting, folder: Path) -> tuple[Setting, Path]:
    """Write everything into a folder, once; the setting with its paths, and where the texts are."""
    if not (folder / "done").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_base(folder / "base")
        write_encoder(folder / "encoder")
        torch.manual_seed(1)
        BertModel(config(layers=1, hidden=48)).save_pretrained(folder / "bert")
        wordpiece().save_pretrained(folder / "bert")
        _write_texts(folder)
        (folder / "done").write_text("")
    names = {name: str(folder / getattr(setting, name)) for name in ("base", "encoder", "transformer")}
    return replace(setting, **names), folder


def _write_texts(folder: Path) -> None:
    for name in ("corpus", "benchmarks"):
        (folder / name).mkdir()
    topics = list(TOPICS)
    for part, count, seed in (("train", TRAIN, 1), ("test", TEST, 2)):
        pairs, labels = topic_pairs(count, seed)
        for number, topic in enumerate(topics):
            rows = [pair for pair, label in zip(pairs, labels, strict=True) if label == number]
            lines = [json.dumps({"instruction": text, "output": answer}) for text, answer in rows]
            (folder / "corpus" / f"{topic}.{part}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "benchmarks" / "quiz.jsonl").write_text("\n".join(map(json.dumps, _questions())) + "\n")


def _questions() -> Iterator[dict[str, object]]:
    draw = random.Random(3)
    for topic, words in TOPICS.items():
        other = draw.choice([name for name in TOPICS if name != topic])
        choices = [draw.choice(words), draw.choice(TOPICS[other])]
        yield {"prompt": f"Question: what belongs to the {topic}?", "choices": choices, "answer": 0}
    yield {"prompts": ["The oven is", "The rudder is"], "continuation": "hot", "answer": 0}
