"""Rows of instruction data: reading them from JSONL and splitting off a held-out part."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loramux.adapters.training.errors import OptionError, RowError

_FIELDS = ("instruction", "input", "output")


@dataclass(frozen=True, slots=True)
class Row:
    """One example: a task, optional material for it, and the answer wanted.

    `domain` is what its file says that it belongs to; nothing but names is made of it.
    """

    instruction: str
    input: str
    output: str
    domain: str = field(default="", compare=False)


def user_text(row: Row) -> str:
    """What a user would type for this row, which is also the text it is routed by."""
    return f"{row.instruction}\n{row.input}" if row.input else row.instruction


def row_hash(row: Row) -> str:
    """SHA-256 of the row's content in hex, the same whatever file or order the row came in."""
    return hashlib.sha256("\0".join((row.instruction, row.input, row.output)).encode()).hexdigest()


def rows_hash(rows: Iterable[Row]) -> str:
    """SHA-256 of a list of rows in hex; the order counts."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(bytes.fromhex(row_hash(row)))
    return digest.hexdigest()


def find_data_files(paths: Sequence[Path]) -> list[Path]:
    """The JSONL files meant by files and folders given, sorted inside each folder.

    A folder that holds `*.train.jsonl` files means those only, so that test files beside them stay unseen;
    any other folder means all its `*.jsonl` files.

    Raises:
        RowError: a path does not exist, or a folder holds no JSONL file.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(path.glob("*.train.jsonl")) or sorted(path.glob("*.jsonl"))
            if not found:
                raise RowError(f"{path}: no *.jsonl file in this folder")
            files.extend(found)
        elif path.is_file():
            files.append(path)
        else:
            raise RowError(f"{path}: no such file or folder")
    return files


def parse_row(line: str, where: str) -> Row:
    """One line of JSONL; errors begin with `where`.

    Raises:
        RowError: it is not a row.
    """
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise RowError(f"{where}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise RowError(f"{where}: a row must be a JSON object, got {type(record).__name__}")
    values: dict[str, str] = {}
    for name in _FIELDS:
        value = record.get(name, "" if name == "input" else None)
        if not isinstance(value, str):
            raise RowError(f'{where}: "{name}" must be a string, got {type(value).__name__}')
        values[name] = value
    domain = record.get("domain")
    row = Row(**values, domain=domain if isinstance(domain, str) else "")
    if not user_text(row).strip():
        raise RowError(f'{where}: "instruction" and "input" are both empty')
    return row


def read_rows(paths: Sequence[Path]) -> list[Row]:
    """Every row of the given JSONL files and folders, in order; empty lines are passed over.

    `input` and `domain` may be absent; keys other than these and `instruction` and `output` are ignored.

    Raises:
        RowError: a path is missing or a line is not a row; the message says `file:line: why`.
    """
    rows: list[Row] = []
    for path in find_data_files(paths):
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise RowError(f"{path}: not UTF-8: {error}") from error
        rows.extend(
            parse_row(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()
        )
    return rows


def split_held_out(rows: Iterable[Row], fraction: float) -> tuple[list[Row], list[Row]]:
    """`(kept, held_out)`: about `fraction` of the rows held out, chosen by a hash of each row's content.

    The choice depends on the row alone, so duplicates fall on one side and adding rows moves no other row.

    Raises:
        OptionError: `fraction` is not in [0, 1).
    """
    if not 0.0 <= fraction < 1.0:
        raise OptionError(f"the held-out fraction must be in [0, 1), got {fraction}")
    limit = int(fraction * 2**32)
    kept: list[Row] = []
    held_out: list[Row] = []
    for row in rows:
        (held_out if int(row_hash(row)[:8], 16) < limit else kept).append(row)
    return kept, held_out
