"""Whether an encoder can read a text at all: how many bytes its tokenizer gets into one token.

A tokenizer cuts prose of the kind that it was made from into tokens of three to five bytes, and a script or a
gibberish that it was not made from into single bytes. Their mean vector says nothing, and lies in the middle
of everything. An encoder that was trained here says in `reading.json` what its own texts needed.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .encoder_files import READING_FILE as READING_FILE
from .encoder_files import read_json, read_tokenizer
from .errors import RouterFileError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_FIELD = "least_bytes_per_token"
_LEAST_VOCABULARY = 4096
# Below what all but one in a thousand of the training texts reach, by a margin for texts unlike them; never
# above what English words that a small vocabulary lacks still have.
_RARE, _MARGIN, _MOST = 0.001, 0.85, 1.8


class Reading:
    """A tokenizer and the least number of UTF-8 bytes a token that a text must have to be read."""

    def __init__(self, tokenizer: "Tokenizer", least: float) -> None:
        """`tokenizer` is copied: here nothing is cut or padded."""
        self._tokenizer = type(tokenizer).from_str(tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.least = least

    @classmethod
    def load(cls, folder: Path, tokenizer_folder: Path) -> "Reading | None":
        """The encoder's own file; None when it has none. Raises RouterFileError naming what is wrong."""
        file = folder / READING_FILE
        if not file.is_file():
            return None
        content = read_json(file)
        least = content.get(_FIELD) if isinstance(content, dict) and set(content) == {_FIELD} else None
        if isinstance(least, bool) or not isinstance(least, int | float) or not 0 < least < 1e3:
            raise RouterFileError(file, _FIELD, f"must be the only key and a positive number, got {least!r}")
        return cls(read_tokenizer(tokenizer_folder / "tokenizer.json"), float(least))

    @classmethod
    def fit(cls, tokenizer: "Tokenizer", texts: Sequence[str]) -> "Reading | None":
        """What the training texts need; None for a vocabulary so small that it cuts plain words."""
        if tokenizer.get_vocab_size() < _LEAST_VOCABULARY:
            return None
        reading = cls(tokenizer, 0.0)
        found = [reading.bytes_per_token(text) for text in texts]
        reading.least = round(min(float(np.quantile(found, _RARE)) * _MARGIN, _MOST), 3)
        return reading

    def save(self, folder: Path) -> None:
        """Write `reading.json`."""
        (folder / READING_FILE).write_text(json.dumps({_FIELD: self.least}) + "\n", encoding="utf-8")

    def bytes_per_token(self, text: str) -> float:
        """UTF-8 bytes of a text over its number of tokens, without prefix and special tokens."""
        tokens = len(self._tokenizer.encode(text, add_special_tokens=False).ids)
        return len(text.encode("utf-8", "replace")) / max(tokens, 1)

    def reads(self, text: str) -> bool:
        """Whether the encoder's vector of this text means anything."""
        return self.bytes_per_token(text) >= self.least
