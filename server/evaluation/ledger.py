"""Scores as they come, kept on disk: an evaluation that was killed goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Self, TextIO

from loramux.server.evaluation.score import Score

Key = tuple[str, str]


class Ledger:
    """`(mixture, item) -> score`, written line by line. Two systems with one mixture share their scores."""

    def __init__(self, path: Path | None, fingerprint: str) -> None:
        """Read what a file holds; one with another fingerprint, or a torn last line, is begun anew or cut.

        `path` None keeps nothing. `fingerprint` stands for everything but the mixture and the item that a
        score depends on.
        """
        self._scores: dict[Key, Score] = {}
        self._file: TextIO | None = None
        if path is None:
            return
        if path.is_file():
            self._read(path, fingerprint)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")
        self._write({"fingerprint": fingerprint})
        for key, score in self._scores.items():
            self._write({"key": key, "score": score.json()})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def __contains__(self, key: Key) -> bool:
        return key in self._scores

    def __getitem__(self, key: Key) -> Score:
        return self._scores[key]

    def __len__(self) -> int:
        return len(self._scores)

    def add(self, key: Key, score: Score) -> None:
        """Remember a score."""
        self._scores[key] = score
        self._write({"key": key, "score": score.json()})

    def _write(self, record: dict[str, object]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def _read(self, path: Path, fingerprint: str) -> None:
        try:
            head, *lines = path.read_text(encoding="utf-8").split("\n")
            if json.loads(head) != {"fingerprint": fingerprint}:
                return
            for line in lines:
                record = json.loads(line)
                mixture, item = record["key"]
                self._scores[str(mixture), str(item)] = Score(**record["score"])
        except (OSError, ValueError, KeyError, TypeError):
            return  # the last line of a killed run, or no ledger at all
