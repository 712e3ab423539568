"""Progress of long work: a bar on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class Ticker:
    """Shows how far one piece of work is; use it as a context manager."""

    def __init__(self, label: str, *, line_seconds: float = 30.0, console: Console | None = None) -> None:
        """Prepare a display called `label`; away from a terminal it prints a line every `line_seconds`."""
        self._console = console or Console(stderr=True)
        self._label = label
        self._line_seconds = line_seconds
        self._last_line = -float("inf")
        self._bar: Progress | None = None

    def __enter__(self) -> Ticker:
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self._console,
            )
            self._task = self._bar.add_task(self._label, total=1.0, note="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, fraction: float, note: str = "") -> None:
        """Show that `fraction` (0 to 1) is done, with a short note beside it."""
        if self._bar is not None:
            self._bar.update(self._task, completed=fraction, note=note)
        elif fraction >= 1.0 or time.monotonic() - self._last_line >= self._line_seconds:
            self._last_line = time.monotonic()
            self.say(f"{self._label}: {fraction:6.1%} {note}".rstrip())

    def say(self, line: str) -> None:
        """Print one line above the bar."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)
