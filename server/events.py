"""What the pipeline yields: one `Opened`, then `Delta`s of any choice, then one `Closed`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from loramux.server.engine.protocol import FinishReason, TokenScore
from loramux.server.selection import Selection
from loramux.server.text.tool_calls import ToolCall

#: Why a choice has ended.
Ending = FinishReason | Literal["tool_calls"]


@dataclass(frozen=True, slots=True)
class BlendReport:
    """What the answer says about the blend that was used."""

    key: str
    method: str
    rank: int
    relative_error: float
    cached: bool


@dataclass(frozen=True, slots=True)
class Opened:
    """The engine has the work. Sent once, before any delta."""

    selection: Selection
    blend: BlendReport
    prompt_tokens: int = 0

    def body(self) -> dict[str, Any]:
        """The `loramux` object of an answer."""
        blend = self.blend
        return {
            "route": self.selection.body(),
            "blend": {
                "key": blend.key,
                "method": blend.method,
                "rank": blend.rank,
                "relative_error": blend.relative_error,
                "cached": blend.cached,
            },
        }

    def header(self) -> str:
        """`x-loramux-experts`."""
        return self.selection.header()


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token's score and the text it added; `text` may be empty while a character is incomplete."""

    score: TokenScore
    text: str


@dataclass(frozen=True, slots=True)
class Delta:
    """More of one choice. `finish` is set on its last; `echo` marks the prompt's own text and scores; `calls`
    are those of tools that have become whole."""

    index: int
    text: str = ""
    tokens: tuple[ScoredToken, ...] = ()
    finish: Ending | None = None
    echo: bool = False
    calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Closed:
    """Every choice has ended. Counts for `usage`, and the `explain` object where it was asked for."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    explanation: Mapping[str, Any] | None = None


Event = Opened | Delta | Closed
