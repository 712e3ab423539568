"""Example texts of an expert: what users ask it, read from files and turned into vectors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loramux.adapters.training.rows import read_rows, user_text
from loramux.router.encoder import Encoder
from loramux.router.router import blank_rows
from loramux.router.state import Vectors
from loramux.server.pool.manifest import PoolError

_PLAIN = ".txt"
_FEWEST = 2


def read_texts(paths: Sequence[Path]) -> list[str]:
    """The texts of JSONL rows (files, or folders of them), or the lines of plain `.txt` files.

    Raises:
        PoolError: a text file cannot be read.
        RowError: as `read_rows`.
    """
    texts: list[str] = []
    for path in paths:
        if path.suffix == _PLAIN and path.is_file():
            texts += _lines(path)
        else:
            texts += [user_text(row) for row in read_rows([path])]
    return texts


def check_texts(id: str, texts: Sequence[str]) -> None:
    """Whether there are enough texts to route by.

    Raises:
        PoolError: fewer than 2.
    """
    if len(texts) < _FEWEST:
        raise PoolError(
            f"expert {id}: {len(texts)} example rows are too few to route by; give at least {_FEWEST}, "
            "better 10 or 50"
        )


def routing_vectors(encoder: Encoder, id: str, texts: Sequence[str]) -> Vectors:
    """Unit vectors [n, d] of an expert's texts.

    Raises:
        PoolError: the encoder cannot read one of them.
    """
    vectors = encoder.encode(texts).vectors
    for number, blank in enumerate(blank_rows(vectors)):
        if blank:
            shown = texts[number] if len(texts[number]) <= 40 else texts[number][:39] + "…"
            raise PoolError(f"expert {id}: example {number + 1}, {shown!r}, has nothing that can be read")
    return vectors


def _lines(file: Path) -> list[str]:
    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PoolError(f"{file}: {error}") from None
    return [line.strip() for line in content.split("\n") if line.strip()]
