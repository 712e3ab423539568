"""One thing that was looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class Level(StrEnum):
    """How bad it is: only a problem keeps the server from starting."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """What was looked at (`name`), what was seen, and what to do where something should be done.

    `numbers` are for programs: the memory budget in bytes.
    """

    name: str
    level: Level
    text: str
    advice: str = ""
    numbers: Mapping[str, int] = field(default_factory=dict)

    def lines(self) -> str:
        """For people: a line, further lines of the text indented, and the advice below."""
        first, *more = self.text.splitlines() or [""]
        lines = [f"{self.level:<8} {self.name}: {first}", *(f"{'':9}{line}" for line in more)]
        if self.advice:
            lines.append(f"{'':9}to do: {self.advice}")
        return "\n".join(lines)

    def json(self) -> dict[str, Any]:
        """For programs; empty fields are left out."""
        return {name: value for name, value in asdict(self).items() if value}
