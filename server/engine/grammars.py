"""Grammars that answers must follow: compiled once, and a matcher of its own for every sequence."""

import asyncio
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence as Items
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llguidance import LLMatcher, LLTokenizer
from llguidance._lib import LLParserLimits
from llguidance.hf import from_tokenizer

from loramux.server.engine.protocol import GrammarError

#: Compiled grammars that are kept, and the characters of all of them together.
KEPT, KEPT_CHARACTERS = 64, 2**20
# What one grammar may cost: about 0.3 s to compile (fuel), 15 ms a token (fuel and items of a step), 30 MB.
LIMITS = LLParserLimits(
    initial_lexer_fuel=2_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=20_000,
    max_grammar_size=500_000,
    verbose_errors=False,
)
_MESSAGE_CHARACTERS = 300
# The place of a fault, drawn below the message.
_QUOTED_GRAMMAR = re.compile(r"\n +\d+ \| .*", re.DOTALL)


class Grammars:
    """Compiles llguidance grammars for one vocabulary, in a thread of its own and one at a time.

    The tables of the vocabulary are made when the first grammar comes: text alone needs none of them.
    """

    def __init__(
        self,
        tokenizer: Any,
        eos_ids: Items[int],
        width: int | None = None,
        *,
        limits: LLParserLimits = LIMITS,
    ) -> None:
        """A fast transformers tokenizer; `eos_ids` that end an answer, the tokenizer's own where there are
        none; `width` of a row of logits, the tokenizer's size if it is not given."""
        self._tokenizer = tokenizer
        self._eos_ids = list(eos_ids)
        self._width = width
        self._limits = limits
        self._table: LLTokenizer | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")

    async def matcher(self, grammar: str) -> LLMatcher:
        """A matcher at the beginning of `grammar`, whose state is its own.

        Raises:
            GrammarError: it cannot be compiled; the message says why, in one line.
        """
        if grammar in self._compiled:  # a copy takes microseconds
            return self._copy(grammar)
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._copy, grammar)

    async def check(self, grammar: str) -> None:
        """Raises `GrammarError` as `matcher` would."""
        await self.matcher(grammar)

    @property
    def eos_ids(self) -> frozenset[int]:
        """The tokens that a grammar allows at its end."""
        return frozenset(self._known().eos_tokens)

    @property
    def width(self) -> int:
        """Tokens that a mask speaks of."""
        return self._known().vocab_size

    def forget(self, grammar: str | None) -> None:
        """Drop a compiled grammar: copies share what a matcher has learnt, and one of them hit a limit."""
        with self._lock:
            self._compiled.pop(grammar or "", None)

    def _copy(self, grammar: str) -> LLMatcher:
        with self._lock:
            compiled = self._compiled.get(grammar)
            if compiled is not None:
                self._compiled.move_to_end(grammar)
        if compiled is None:
            compiled = self._compile(grammar)
            with self._lock:
                self._compiled[grammar] = compiled
                while len(self._compiled) > KEPT or sum(map(len, self._compiled)) > KEPT_CHARACTERS:
                    self._compiled.popitem(last=False)
        return compiled.deep_copy()

    def _compile(self, grammar: str) -> LLMatcher:
        matcher = LLMatcher(self._known(), grammar, log_level=0, limits=self._limits)
        problems = [matcher.get_error()] if matcher.is_error() else matcher.get_grammar_warnings()
        if problems:
            raise GrammarError(one_line(problems[0]))
        return matcher

    def _known(self) -> LLTokenizer:
        with self._lock:
            if self._table is None:
                try:
                    self._table = from_tokenizer(
                        self._tokenizer, n_vocab=self._width, eos_token=self._eos_ids or None
                    )
                except Exception as error:  # whatever a tokenizer can do that the library does not know
                    reason = one_line(str(error))
                    raise GrammarError(f"the base's tokenizer allows no grammars: {reason}") from None
            return self._table


async def matcher_of(grammars: Grammars | None, grammar: str | None) -> LLMatcher | None:
    """The matcher of a sequence, `None` without a grammar.

    Raises:
        GrammarError: as `Grammars.matcher`, or where there are no grammars.
    """
    if grammar is None:
        return None
    if grammars is None:
        raise GrammarError("this engine was made without grammars")
    return await grammars.matcher(grammar)


def one_line(problem: str) -> str:
    """The library's account of a fault as a line; keywords of a schema by their names."""
    head, _, keys = problem.partition("Unimplemented keys: ")
    if keys and not head:
        return f"the JSON Schema keywords {', '.join(json.loads(keys))} are not supported"
    told = _QUOTED_GRAMMAR.sub("", problem.replace("<non-verbose/>", ""))
    line = " ".join(told.split())
    return line if len(line) <= _MESSAGE_CHARACTERS else line[:_MESSAGE_CHARACTERS] + "…"
