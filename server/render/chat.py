"""Chat answers."""

from dataclasses import dataclass, field
from typing import Any

from loramux.server.events import Delta, ScoredToken
from loramux.server.render.renderer import Renderer, WholeChoice
from loramux.server.text.scores import chat_entry
from loramux.server.wire.chat import chat_choice, chat_chunk_choice, chat_logprobs


@dataclass(slots=True)
class ChatRenderer(Renderer):
    """The first chunk of a choice names the role."""

    _spoken: set[int] = field(default_factory=set, init=False)

    def entry(self, token: ScoredToken) -> dict[str, Any]:
        return chat_entry(self.vocabulary, token)

    def next_choice(self, delta: Delta) -> dict[str, Any]:
        entries = self.entries(delta)
        first = delta.index not in self._spoken
        self._spoken.add(delta.index)
        return chat_chunk_choice(
            delta.index,
            text=delta.text if delta.text or not delta.finish else None,
            first=first,
            logprobs=chat_logprobs(entries) if entries else None,
            finish_reason=delta.finish,
        )

    def whole_choice(self, index: int, choice: WholeChoice) -> dict[str, Any]:
        return chat_choice(
            index,
            text="".join(choice.text),
            logprobs=chat_logprobs(choice.entries) if self.logprobs else None,
            finish_reason=choice.finish,
        )
