"""Test sets: rows with one right answer, and questions with choices, from JSONL files."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramux.adapters.training.rows import Row, parse_row, row_hash, user_text
from loramux.server.errors import StartError

_QUESTION = re.compile(r"^Question:", re.MULTILINE)
#: A continuation that begins so follows its prompt without a space.
_ATTACHED = tuple(" \n.,;:!?'’)")


@dataclass(frozen=True, slots=True)
class AnswerItem:
    """A row whose answer is known: its loss and its exact match are measured."""

    domain: str
    row: Row

    @property
    def id(self) -> str:
        return row_hash(self.row)[:24]

    @property
    def text(self) -> str:
        """What it is routed by."""
        return user_text(self.row)


@dataclass(frozen=True, slots=True)
class ChoiceItem:
    """A question with choices. `contexts[i] + continuations[i]` is the i-th choice as a text; `sizes[i]` its
    length in bytes, by which acc_norm divides."""

    domain: str
    text: str
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    answer: int

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(max(1, len(one.strip().encode())) for one in self.continuations)

    @property
    def id(self) -> str:
        content = json.dumps([self.text, self.contexts, self.continuations, self.answer])
        return hashlib.sha256(content.encode()).hexdigest()[:24]


Item = AnswerItem | ChoiceItem


def read_items(paths: Sequence[Path], *, limit: int | None = None, seed: int = 0) -> dict[str, list[Item]]:
    """Items by domain, of files and folders of them (`*.test.jsonl` only, where a folder has such).

    A line is a row (`instruction`, `input`, `output`), a question (`prompt`, `choices`, `answer`), or one
    continuation after several prompts (`prompts`, `continuation`, `answer`). Its domain is its own `domain`,
    else the name of its file. With `limit`, that many of each domain, drawn by `seed`.

    Raises:
        StartError, RowError: a path is missing or a line is none of these; names file and line.
    """
    found: dict[str, list[Item]] = {}
    for file in _files(paths):
        try:
            lines = file.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise StartError(f"{file}: {error}") from None
        for number, line in enumerate(lines, 1):
            if line.strip():
                item = _item(line, f"{file}:{number}", file.name.split(".")[0])
                found.setdefault(item.domain, []).append(item)
    if not found:
        raise StartError("the data holds no rows; give JSONL files or folders of them")
    if limit is not None:
        drawn = random.Random(seed)
        found = {
            domain: items if len(items) <= limit else drawn.sample(items, limit)
            for domain, items in sorted(found.items())
        }
    return dict(sorted(found.items()))


def _files(paths: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(path.glob("*.test.jsonl")) or sorted(path.glob("*.jsonl"))
            if not inside:
                raise StartError(f"{path}: no *.jsonl file in this folder")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise StartError(f"{path}: no such file or folder")
    return files


def _item(line: str, where: str, name: str) -> Item:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise StartError(f"{where}: not JSON: {error}") from None
    if isinstance(record, dict) and ("choices" in record or "prompts" in record):
        return _choice(record, where, name)
    row = parse_row(line, where)
    return AnswerItem(row.domain or name, row)


def _choice(record: Mapping[str, Any], where: str, name: str) -> ChoiceItem:
    if "choices" in record:
        choices = _texts(record, "choices", where)
        prompt = _text(record, "prompt", where)
        contexts = [_context(prompt)] * len(choices)
        shown = prompt
    else:
        contexts = [prompt.rstrip() for prompt in _texts(record, "prompts", where)]
        choices = [_text(record, "continuation", where)] * len(contexts)
        shown = contexts[0]
    answer = record.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise StartError(f'{where}: "answer" must be the number of a choice, from 0 to {len(choices) - 1}')
    domain = record.get("domain")
    return ChoiceItem(
        domain if isinstance(domain, str) and domain else name,
        shown,
        tuple(contexts),
        tuple(one if one.startswith(_ATTACHED) else f" {one}" for one in choices),
        answer,
    )


def _context(prompt: str) -> str:
    """A prompt that asks a question in so many words is followed by `Answer:`."""
    prompt = prompt.rstrip()
    asks = _QUESTION.search(prompt) is not None and not prompt.endswith("Answer:")
    return f"{prompt}\nAnswer:" if asks else prompt


def _text(record: Mapping[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise StartError(f'{where}: "{key}" must be a text')
    return value


def _texts(record: Mapping[str, Any], key: str, where: str) -> list[str]:
    value = record.get(key)
    if (
        not isinstance(value, list)
        or len(value) < 2
        or not all(isinstance(one, str) and one for one in value)
    ):
        raise StartError(f'{where}: "{key}" must be a list of two texts or more')
    return value
