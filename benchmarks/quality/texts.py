"""What is trained on: rows drawn by a seed up to a number of tokens. What is measured: fixed items."""

import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality.setting import Setting, SettingError
from loramux.adapters.training.chat import encode_rows
from loramux.adapters.training.rows import Row, read_rows
from loramux.server.evaluation.items import AnswerItem, ChoiceItem, Item, read_items

TEST_SEED = 20_240_501
_CHUNK = 64


@dataclass(frozen=True)
class TestSet:
    """The same rows and questions for every cell, by domain and by benchmark, in a fixed order."""

    __test__ = False  # not a test, whatever pytest thinks of its name

    rows: Mapping[str, list[AnswerItem]]
    choices: Mapping[str, list[ChoiceItem]]

    @property
    def digest(self) -> str:
        """SHA-256 over the items' ids."""
        ids = [item.id for group in (self.rows, self.choices) for items in group.values() for item in items]
        return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def test_set(setting: Setting, data: Path, tokenizer: Any) -> TestSet:
    """Test rows that fit the setting's length, and questions of `data/benchmarks` where it asks for some."""
    found = read_items([data / "corpus"])
    rows: dict[str, list[AnswerItem]] = {}
    for domain in domains_of(setting, data):
        answers = [item for item in found.get(domain, []) if isinstance(item, AnswerItem)]
        random.Random(TEST_SEED).shuffle(answers)
        rows[domain] = _fitting(answers, setting, tokenizer)
        if not rows[domain]:
            raise SettingError(f"{data / 'corpus'}: no test row of {domain} is within {setting.max_tokens}")
    choices: dict[str, list[ChoiceItem]] = {}
    if setting.choices:
        asked: dict[str, list[Item]] = read_items(
            [data / "benchmarks"], limit=setting.choices, seed=TEST_SEED
        )
        choices = {
            name: [item for item in items if isinstance(item, ChoiceItem)] for name, items in asked.items()
        }
    return TestSet(rows, choices)


test_set.__test__ = False  # type: ignore[attr-defined]


def _fitting(items: list[AnswerItem], setting: Setting, tokenizer: Any) -> list[AnswerItem]:
    kept: list[AnswerItem] = []
    for start in range(0, len(items), _CHUNK):
        part = items[start : start + _CHUNK]
        encoded = encode_rows(tokenizer, [item.row for item in part], setting.max_tokens + 1)
        fits = [row.answer_start < len(row) <= setting.max_tokens for row in encoded]
        kept += [item for item, fit in zip(part, fits, strict=True) if fit]
        if len(kept) >= setting.rows:
            break
    return kept[: setting.rows]


def domains_of(setting: Setting, data: Path) -> tuple[str, ...]:
    """Those of the setting, or all that have training rows."""
    if setting.domains is not None:
        return setting.domains
    names = sorted(file.name.split(".")[0] for file in (data / "corpus").glob("*.train.jsonl"))
    if not names:
        raise SettingError(f"{data / 'corpus'}: no *.train.jsonl file in it")
    return tuple(names)


def training_rows(setting: Setting, data: Path, seed: int, tokenizer: Any, out: Path) -> Path:
    """A folder of JSONL files that together have the setting's tokens, every domain as many.

    Rows longer than `max_tokens` are passed over, so that no answer is cut. The folder is written once.
    """
    inputs = setting.inputs(None, seed)
    done = out / "done"
    if done.is_file() and done.read_text() == inputs:
        return out
    out.mkdir(parents=True, exist_ok=True)
    domains = domains_of(setting, data)
    share = setting.tokens / len(domains)
    for domain in domains:
        rows = read_rows([data / "corpus" / f"{domain}.train.jsonl"])
        random.Random(f"{seed} {domain}").shuffle(rows)
        lines = [_line(row, domain) for row in _within(rows, share, setting, tokenizer)]
        (out / f"{domain}.train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    done.write_text(inputs)
    return out


def _within(rows: list[Row], share: float, setting: Setting, tokenizer: Any) -> list[Row]:
    """The first rows that fit, until they have `share` tokens; twice the same row counts once."""
    kept: dict[Row, None] = {}
    total = 0
    for start in range(0, len(rows), _CHUNK):
        part = rows[start : start + _CHUNK]
        for row, encoded in zip(part, encode_rows(tokenizer, part, setting.max_tokens + 1), strict=True):
            if total >= share:
                return list(kept)
            if encoded.answer_start < len(encoded) <= setting.max_tokens and row not in kept:
                kept[row] = None
                total += len(encoded)
    return list(kept)


def _line(row: Row, domain: str) -> str:
    return json.dumps(
        {"domain": domain, "instruction": row.instruction, "input": row.input, "output": row.output}
    )
