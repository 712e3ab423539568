"""How far a sequence has come at an engine that may be lost."""

from dataclasses import dataclass, field, replace

from loramux.server.engine.protocol import Event, PromptScored, Started, Token, Work


@dataclass(slots=True)
class Course:
    """What another engine needs to go on.

    Attributes:
        answered: the tokens so far.
        sent: it was given to an engine, so that the next one gets what is left.
    """

    work: Work
    answered: list[int] = field(default_factory=list)
    sent: bool = False
    started: bool = False
    scored: bool = False

    def next(self) -> Work:
        """What to send: all of it, or what is left."""
        if not self.sent:
            return self.work
        wanted = None if self.scored else self.work.prompt_logprobs
        return replace(self.work, answered=tuple(self.answered), prompt_logprobs=wanted)

    def take(self, event: Event) -> bool:
        """Whether the event is news."""
        match event:
            case Started():
                news, self.started = not self.started, True
                return news
            case PromptScored():
                self.scored = True
            case Token():
                self.answered.append(event.score.id)
        return True
