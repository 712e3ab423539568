"""Which tokens of which sequences the next step computes."""

from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass
from statistics import median

from loramux.server.engine.pages import Pages, page_hash
from loramux.server.engine.sequence import Sequence

#: While answers run, a step may take this many times as long as without the prompts that join it.
STRETCH = 3.5
#: Fewer prompt tokens than this a step are not worth their overhead: on a CPU, and on a device, where a step
#: that is not captured takes as long as its launches do.
LEAST_CHUNK, LEAST_CHUNK_ON_DEVICE = 16, 256
RECENT = 5


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens `start` to `start + length` of a sequence, to be computed in one step."""

    sequence: Sequence
    start: int
    length: int

    @property
    def samples(self) -> bool:
        """Whether the sequence's next token is known after this step."""
        return self.start + self.length == len(self.sequence.tokens)


class Tempo:
    """How many prompt tokens may join the answers that run, from how long steps have taken of late.

    Medians over the last few steps: one in which something was compiled or copied changes nothing, and what a
    token costs may grow with the length of its prompt.
    """

    def __init__(self, least: int = LEAST_CHUNK) -> None:
        """`least`: fewer prompt tokens than this a step take no less time."""
        self._least = least
        self._decodes: deque[float] = deque(maxlen=RECENT)
        self._prompts: deque[float] = deque(maxlen=RECENT)

    def stepped(self, seconds: float, prompt_tokens: int, decodes: int) -> None:
        """A step has ended."""
        if not prompt_tokens:
            self._decodes.append(seconds)
            return
        alone = median(self._decodes) if decodes and self._decodes else 0.0
        self._prompts.append(max(seconds - alone, 0.1 * seconds) / prompt_tokens)

    def allowance(self, decodes: int) -> int | None:
        """Prompt tokens for the next step; `None`: as many as it has room for."""
        if not decodes or not self._decodes or not self._prompts:
            return None
        added = (STRETCH - 1) * median(self._decodes)
        return max(self._least, int(added / median(self._prompts)))


class Scheduler:
    """First come, first served. Answers go on in every step and prompts join them in pieces; where the cache
    is short, the youngest sequence gives its pages back and is computed again later.

    Used by the stepping thread alone.
    """

    def __init__(
        self, pages: Pages, *, max_running: int, max_tokens: int, least_chunk: int = LEAST_CHUNK
    ) -> None:
        self.pages = pages
        self.tempo = Tempo(least_chunk)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._max_running = max_running
        self._max_tokens = max_tokens

    @property
    def is_idle(self) -> bool:
        return not self.running and not self.waiting

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """It has ended, however; no later step includes it."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def next(self) -> list[Chunk]:
        """The next step: single tokens first, then pieces of prompts; their pages are theirs already."""
        chunks = [
            Chunk(sequence, sequence.computed, 1)
            for sequence in list(self.running)
            if sequence.computed == len(sequence.tokens) - 1 and self._make_room(sequence, 1)
        ]
        room = self._max_tokens - len(chunks)
        allowed = self.tempo.allowance(len(chunks))
        room = room if allowed is None else min(room, allowed)
        chosen = {id(chunk.sequence) for chunk in chunks}
        for sequence in list(self.running):
            if room <= 0:
                return chunks
            length = min(room, len(sequence.tokens) - sequence.computed)
            if id(sequence) not in chosen and self._make_room(sequence, length):
                chunks.append(Chunk(sequence, sequence.computed, length))
                room -= length
        # A sequence that had to give way is younger than some that are chosen, but older than all that wait.
        while room > 0 and self.waiting and len(self.running) < self._max_running:
            sequence = self.waiting[0]
            if not self._admit(sequence):
                break
            length = min(room, len(sequence.tokens) - sequence.computed)
            self.pages.grow(sequence.pages, sequence.computed + length)
            chunks.append(Chunk(sequence, sequence.computed, length))
            room -= length
        return [chunk for chunk in chunks if chunk.sequence in self.running]

    def done(self, chunks: Items[Chunk]) -> None:
        """A step has computed these; call it before the sequences take their new tokens."""
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.computed = chunk.start + chunk.length
            size = self.pages.size
            for index in range(len(sequence.hashes), sequence.computed // size):
                before = sequence.hashes[-1] if sequence.hashes else sequence.root
                digest = page_hash(before, sequence.tokens[index * size : (index + 1) * size])
                sequence.hashes.append(digest)
                self.pages.publish(sequence.pages[index], digest)

    def _admit(self, sequence: Sequence) -> bool:
        """Move the first that waits to those that run, if all of its tokens have room."""
        if sequence.needs_prompt_scores:  # every position of the prompt has to be computed
            pages, hashes = list[int](), list[bytes]()
        else:
            # The last token is computed in any case: its logits are what the step is for.
            pages, hashes = self.pages.match(sequence.root, sequence.tokens[:-1])
        if self.pages.needed(len(sequence.tokens) + 1) - len(pages) > self.pages.free and self.running:
            self.pages.release(pages)
            return False
        self.waiting.popleft()
        self.running.append(sequence)
        sequence.pages, sequence.hashes = pages, hashes
        sequence.computed = len(pages) * self.pages.size
        return True

    def _make_room(self, sequence: Sequence, length: int) -> bool:
        """Pages for so many more tokens, taken from the youngest where none are free; False if that is the
        sequence itself."""
        while sequence in self.running:
            if self.pages.grow(sequence.pages, sequence.computed + length):
                return True
            youngest = self.running.pop()
            self.preemptions += 1
            self._release(youngest)
            self.waiting.appendleft(youngest)
        return False

    def _release(self, sequence: Sequence) -> None:
        self.pages.release(sequence.pages)
        sequence.pages, sequence.hashes, sequence.computed = [], [], 0
