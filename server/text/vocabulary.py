"""Token ids and the exact bytes they stand for.

Text is assembled from bytes and decoded as UTF-8, which is exact and linear; asking a tokenizer to decode a
growing list is neither. Two families of tokenizers are known: byte-level BPE (GPT-2, Llama 3, Qwen, the demo
base) and sentencepiece with byte fallback (Llama 2, Mistral, Gemma).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from loramux.server.errors import StartError

_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """`pieces[id]` is the byte string of a token; `special` ids stand for no text."""

    pieces: Mapping[int, bytes]
    special: frozenset[int]

    @cached_property
    def longest(self) -> int:
        """Bytes of the longest piece: a text of `n` bytes has at least `n / longest` tokens."""
        return max(map(len, self.pieces.values()))

    @cached_property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.pieces) + 1

    def text_bytes(self, token: int) -> bytes:
        """What the token adds to the text: nothing for special and unknown ids."""
        return b"" if token in self.special else self.pieces.get(token, b"")

    def name(self, token: int) -> str:
        """The token for people: special tokens by their name, broken UTF-8 as replacement characters."""
        return self.pieces.get(token, b"").decode("utf-8", "replace")

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> "Vocabulary":
        """Of a transformers tokenizer.

        Raises:
            StartError: not a fast one, or of a family that is not known here.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if backend is None:
            raise StartError(f"tokenizer {name}: it has no tokenizer.json; convert it to a fast tokenizer")
        return cls.from_description(json.loads(backend.to_str()), name)

    @classmethod
    def from_description(cls, described: dict[str, Any], source: str) -> "Vocabulary":
        """From the parsed JSON of a fast tokenizer.

        Raises:
            StartError: a family that is not known here.
        """
        kinds = _decoder_kinds(described.get("decoder"))
        if "ByteLevel" in kinds:
            to_bytes = _byte_level
        elif kinds & {"ByteFallback", "Metaspace", "Replace"}:
            to_bytes = _sentencepiece
        else:
            shown = ", ".join(sorted(kinds)) or "none"
            raise StartError(f"tokenizer {source}: decoder {shown} is not supported; use a byte-level BPE or "
                             "sentencepiece tokenizer")  # fmt: skip
        vocab = described["model"]["vocab"]
        entries = vocab.items() if isinstance(vocab, dict) else ((item[0], i) for i, item in enumerate(vocab))
        pieces = {int(token): to_bytes(text) for text, token in entries}
        added = described.get("added_tokens", [])
        pieces |= {int(entry["id"]): entry["content"].encode() for entry in added}
        special = frozenset(int(entry["id"]) for entry in added if entry.get("special"))
        return cls(pieces, special)


def _decoder_kinds(decoder: dict[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    if decoder["type"] == "Sequence":
        return set().union(*(_decoder_kinds(part) for part in decoder["decoders"]))
    return {decoder["type"]}


def _sentencepiece(text: str) -> bytes:
    match = _BYTE_FALLBACK.fullmatch(text)
    return bytes([int(match[1], 16)]) if match else text.replace("▁", " ").encode()


def _byte_level(text: str) -> bytes:
    try:
        return bytes(map(_byte_level_table().__getitem__, text))
    except KeyError:
        return text.encode()


@lru_cache(maxsize=1)
def _byte_level_table() -> dict[str, int]:
    """GPT-2's printable stand-ins: printable Latin-1 for itself, the other bytes from U+0100 up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
