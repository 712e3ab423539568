"""Tokens in, text out, one token at a time."""

import codecs

from loramux.server.text.vocabulary import Vocabulary


class Detokenizer:
    """Text of a sequence as it grows. Pure; `feed` every token once, `finish` at the end.

    The bytes of a character that is not complete yet are held back; bytes that can be no character become
    U+FFFD at once. Work per token does not depend on how long the sequence is.
    """

    def __init__(self, vocabulary: Vocabulary, visible: frozenset[int] = frozenset()) -> None:
        """`visible`: special tokens that are text all the same."""
        self._vocabulary = vocabulary
        self._visible = visible
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """The characters that this token completes."""
        if token in self._visible:
            return self._decoder.decode(self._vocabulary.pieces[token])
        return self._decoder.decode(self._vocabulary.text_bytes(token))

    def finish(self) -> str:
        """Ends the text; the beginning of a character that never was completed is dropped."""
        self._decoder.reset()
        return ""
