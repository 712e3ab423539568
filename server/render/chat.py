"""Chat answers."""

from dataclasses import dataclass, field
from typing import Any

from loramux.server.events import Delta, ScoredToken
from loramux.server.render.renderer import Renderer, WholeChoice
from loramux.server.text.scores import chat_entry
from loramux.server.wire.chat import call_deltas, chat_choice, chat_chunk_choice, chat_logprobs


@dataclass(slots=True)
class ChatRenderer(Renderer):
    """The first chunk of a choice names the role."""

    _spoken: set[int] = field(default_factory=set, init=False)

    def entry(self, token: ScoredToken) -> dict[str, Any]:
        return chat_entry(self.vocabulary, token)

    def next_choices(self, delta: Delta) -> list[dict[str, Any]]:
        entries = self.entries(delta)
        logprobs = chat_logprobs(entries) if entries else None
        first = delta.index not in self._spoken
        self._spoken.add(delta.index)
        if not delta.calls:
            text = delta.text if delta.text or not delta.finish else None
            return [
                chat_chunk_choice(
                    delta.index, text=text, first=first, logprobs=logprobs, finish_reason=delta.finish
                )
            ]
        # Text comes before the calls, and the end after them.
        choices = [chat_chunk_choice(delta.index, call=call) for call in call_deltas(delta.calls)]
        if delta.text or logprobs or first:
            text = delta.text or None
            choices.insert(0, chat_chunk_choice(delta.index, text=text, first=first, logprobs=logprobs))
        if delta.finish:
            choices.append(chat_chunk_choice(delta.index, finish_reason=delta.finish))
        return choices

    def whole_choice(self, index: int, choice: WholeChoice) -> dict[str, Any]:
        return chat_choice(
            index,
            text="".join(choice.text),
            calls=choice.calls,
            logprobs=chat_logprobs(choice.entries) if self.logprobs else None,
            finish_reason=choice.finish,
        )
