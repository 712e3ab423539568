"""Who has which page of the key-value cache, and which pages hold a prefix that others may start from."""

import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence


def page_hash(before: bytes, tokens: Sequence[int]) -> bytes:
    """Of a full page: of its tokens and all that came before them. The chain begins with the blend's key, so
    two blends with one prompt never share a page."""
    return hashlib.sha256(before + array("q", tokens).tobytes()).digest()


class Pages:
    """A ledger of `count` pages of `size` tokens; it holds no tensors.

    A page that is let go keeps its content, and its hash, until its room is needed: the longest unused goes
    first, and of one sequence the last page before the first. Pages without a hash go before those that were
    never used, for which a CPU would have to find memory.
    """

    def __init__(self, count: int, size: int, *, sharing: bool = True) -> None:
        self.count = count
        self.size = size
        self._sharing = sharing
        self._users = [0] * count
        self._hashes: list[bytes | None] = [None] * count
        self._found: dict[bytes, int] = {}
        self._empty = deque(range(count))
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def free(self) -> int:
        """Pages that a sequence could get, cached prefixes included."""
        return len(self._empty) + len(self._idle)

    def needed(self, tokens: int) -> int:
        """Pages for so many tokens."""
        return -(-tokens // self.size)

    def match(self, root: bytes, tokens: Sequence[int]) -> tuple[list[int], list[bytes]]:
        """The pages of the longest known prefix of `tokens` and their hashes. They are taken: `release`
        them."""
        pages: list[int] = []
        hashes: list[bytes] = []
        before = root
        for start in range(0, len(tokens) - self.size + 1, self.size) if self._sharing else ():
            before = page_hash(before, tokens[start : start + self.size])
            page = self._found.get(before)
            if page is None:
                break
            if not self._users[page]:
                del self._idle[page]
            self._users[page] += 1
            pages.append(page)
            hashes.append(before)
        return pages, hashes

    def grow(self, pages: list[int], tokens: int) -> bool:
        """Add pages until there is room for so many tokens; adds none and returns False where there are too
        few."""
        missing = self.needed(tokens) - len(pages)
        if missing > self.free:
            return False
        for _ in range(missing):
            if self._empty:
                page = self._empty.popleft()
            else:
                page, _ = self._idle.popitem(last=False)
                self._forget(page)
            self._users[page] = 1
            pages.append(page)
        return True

    def publish(self, page: int, digest: bytes) -> None:
        """The page is full and computed: others may start from it."""
        if self._sharing and digest not in self._found:
            self._found[digest] = page
            self._hashes[page] = digest

    def release(self, pages: Sequence[int]) -> None:
        """A sequence needs its pages no more."""
        for page in pages:
            self._users[page] -= 1
            if not self._users[page] and self._hashes[page] is None:
                self._empty.appendleft(page)
        for page in reversed(pages):
            if not self._users[page] and self._hashes[page] is not None:
                self._idle[page] = None

    def _forget(self, page: int) -> None:
        digest, self._hashes[page] = self._hashes[page], None
        if digest is not None:
            del self._found[digest]
