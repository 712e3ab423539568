"""Stop strings, found in text that arrives in pieces."""

from collections.abc import Sequence


class StopScanner:
    """Lets text through and holds back what may be the beginning of a stop string.

    The stop that is complete first wins, among those that end together the longest; the stop and all after it
    are not let through. How the text was cut into pieces makes no difference. Knuth-Morris-Pratt per stop, so
    the work is linear in the text.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._matchers = [_Matcher(stop) for stop in stops]
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """The text that is certain not to belong to a stop; `matched` is set once a stop is complete."""
        if not self._matchers:
            return text
        if self.matched is not None:
            return ""
        for position, char in enumerate(text):
            ended = [matcher for matcher in self._matchers if matcher.step(char)]
            if ended:
                self.matched = max((matcher.pattern for matcher in ended), key=len)
                seen = self._held + text[: position + 1]
                self._held = ""
                return seen[: -len(self.matched)]
        seen = self._held + text
        keep = max(matcher.length for matcher in self._matchers)
        self._held = seen[len(seen) - keep :]
        return seen[: len(seen) - keep]

    def finish(self) -> str:
        """The text held back, which turned out to be no stop."""
        rest, self._held = self._held, ""
        return rest


class _Matcher:
    """How much of `pattern` the text read so far ends with."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.length = 0
        self._borders = _borders(pattern)

    def step(self, char: str) -> bool:
        """Read one character; true when the pattern ends here."""
        while self.length and (self.length == len(self.pattern) or self.pattern[self.length] != char):
            self.length = self._borders[self.length - 1]
        if self.pattern[self.length] == char:
            self.length += 1
        return self.length == len(self.pattern)


def _borders(pattern: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(pattern)
    length = 0
    for i in range(1, len(pattern)):
        while length and pattern[i] != pattern[length]:
            length = borders[length - 1]
        if pattern[i] == pattern[length]:
            length += 1
        borders[i] = length
    return borders
