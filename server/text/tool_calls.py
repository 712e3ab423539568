"""Calls of tools in text that arrives in pieces, by transformers' response parser."""

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers.utils.chat_parsing import ResponseParser

from loramux.server.engine.protocol import FinishReason

_CALLS = "tool_calls"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call, its arguments as JSON text; `index` counts the calls of one answer."""

    index: int
    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Said:
    """What a piece of an answer has shown."""

    text: str = ""
    calls: tuple[ToolCall, ...] = ()

    def __add__(self, other: "Said") -> "Said":
        return Said(self.text + other.text, self.calls + other.calls)


class TextReader:
    """Reads the text of an answer that calls nothing."""

    calls = 0

    @property
    def ended(self) -> bool:
        """Whether the answer is over, whatever would follow."""
        return False

    def feed(self, text: str) -> Said:
        """Go on by a piece of text."""
        return Said(text)

    def finish(self) -> Said:
        """The text has ended."""
        return Said()

    def ending(self, reason: FinishReason) -> FinishReason | Literal["tool_calls"]:
        """Why the answer has ended, when the engine ended it for this reason."""
        return "tool_calls" if self.calls and reason == "stop" else reason


class CallParser(TextReader):
    """Reads the text of an answer that may call. What looked like a call and is none is shown as it was
    written, and so is all that follows it."""

    def __init__(
        self, template: Mapping[str, Any], tools: Sequence[Mapping[str, Any]], prefix: str, most: int | None
    ) -> None:
        """`prefix` is what the prompt has written of the answer; after `most` calls the answer is over."""
        self._parser = ResponseParser(dict(template), prefix=prefix, tools=[dict(tool) for tool in tools])
        self._most = most
        self._raw = ""  # since the parser has last shown something that is no call
        self._broken = False
        self.calls = 0

    @property
    def ended(self) -> bool:
        return self._most is not None and self.calls >= self._most

    def feed(self, text: str) -> Said:
        if self._broken or self.ended:
            return Said("" if self.ended else text)
        self._raw += text
        try:
            return self._read(self._parser.feed(text))
        except (ValueError, KeyError, TypeError):
            return self._break()

    def finish(self) -> Said:
        if self._broken or self.ended:
            return Said()
        try:
            return self._read(self._parser.finalize()[1])
        except (ValueError, KeyError, TypeError):
            return self._break()

    def _break(self) -> Said:
        self._broken = True
        return Said(self._raw)

    def _read(self, events: Sequence[Mapping[str, Any]]) -> Said:
        text = ""
        calls: list[ToolCall] = []
        for event in events:
            if event["type"] == "region_chunk" and event["field"] != _CALLS:
                text += event["text"]
                self._raw = ""
            elif event["type"] == "region_close" and event["field"] == _CALLS:
                value = event["value"]
                for one in value if isinstance(value, list) else [value]:
                    if not self.ended:
                        calls.append(self._call(one["function"]))
                        self.calls += 1
                self._raw = ""
        # Between calls, and after them, there are blanks that nobody wants to see.
        return Said("" if self.calls and not text.strip() else text, tuple(calls))

    def _call(self, function: Mapping[str, Any]) -> ToolCall:
        name, arguments = function["name"], function["arguments"]
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise TypeError("a call has a name and an object of arguments")
        return ToolCall(
            self.calls, f"call_{uuid.uuid4().hex[:24]}", name, json.dumps(arguments, ensure_ascii=False)
        )
