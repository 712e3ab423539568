"""`loramux chat`: a conversation in the terminal, with the experts of each answer."""

import importlib
import sys
import unicodedata
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from loramux.server.cli.remote import Answer, Remote, RemoteError

HELP = """\
/model [NAME]  who answers: auto, an expert, the base, a sparse model; without a name, all of them
/route [TEXT]  the router's whole decision about a text, or about your last message; nothing is generated
/system [TEXT] the system prompt; without a text, none
/again         answer the last message again
/new           forget the conversation
/quit          leave (Ctrl-D too); Ctrl-C stops an answer"""


def chat(
    url: Annotated[str, typer.Option(help="Address of a running server.")] = "http://127.0.0.1:8000",
    key: Annotated[
        str | None, typer.Option(envvar="LORAMUX_API_KEY", help="API key, where the server has keys.")
    ] = None,
    model: Annotated[str, typer.Option(help="auto, an expert, the base or a sparse model.")] = "auto",
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 to 2; default: the server's.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of an answer.")] = None,
    seed: Annotated[int | None, typer.Option(help="For answers that can be had again.")] = None,
) -> None:
    """Talk to a running server; each answer says which experts gave it. Text on stdin is asked line by line.

    Example: loramux chat --temperature 0 --max-tokens 64
    """
    remote = Remote(url, key)
    known = remote.models()
    if model not in known:
        raise RemoteError(f"{model!r} is not served; {', '.join(known)} are")
    fields = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    talk = Conversation(
        remote, model, system, {name: value for name, value in fields.items() if value is not None}
    )
    if sys.stdin.isatty():
        with suppress(ImportError):  # arrow keys and history, where Python has them
            importlib.import_module("readline")
        typer.echo(f"{model} at {remote.url}; /help says what else there is")
        talk.interactive(_line)
    else:
        talk.each(sys.stdin)


@dataclass(slots=True)
class Conversation:
    """Messages so far, and who answers."""

    remote: Remote
    model: str
    system: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)

    def interactive(self, line: Callable[[], str]) -> None:
        """Until the end of the input; what goes wrong is said, and the conversation goes on."""
        while True:
            try:
                text = line()
            except (EOFError, KeyboardInterrupt):
                typer.echo()
                return
            try:
                if not self.take(text):
                    return
            except RemoteError as error:
                typer.secho(str(error), fg="red", err=True)

    def each(self, lines: Iterable[str]) -> None:
        """Every line of a file; the first failure ends it.

        Raises:
            RemoteError: the server refused or failed.
        """
        for text in lines:
            if not self.take(text):
                return

    def take(self, text: str) -> bool:
        """One line of the user. Whether to go on."""
        text = text.strip()
        name, _, rest = text.partition(" ")
        rest = rest.strip()
        match name:
            case "":
                pass
            case "/quit" | "/exit":
                return False
            case "/help":
                typer.echo(HELP)
            case "/model":
                self._model(rest)
            case "/route":
                self._route(rest)
            case "/system":
                self.system = rest or None
            case "/new":
                self.messages.clear()
            case "/again":
                self._again()
            case _ if name.startswith("/"):
                typer.secho(f"{name} is no command; /help lists them", fg="red", err=True)
            case _:
                self.messages.append({"role": "user", "content": text})
                self._answer()
        return True

    def _model(self, name: str) -> None:
        known = self.remote.models()
        if not name:
            for one in known:
                typer.echo(f"{'*' if one == self.model else ' '} {one}")
        elif name in known:
            self.model = name
        else:
            raise RemoteError(f"{name!r} is not served; /model lists what is")

    def _route(self, text: str) -> None:
        asked = text or next((m["content"] for m in reversed(self.messages) if m["role"] == "user"), "")
        if not asked:
            raise RemoteError("nothing has been asked yet; /route TEXT takes a text")
        decision = self.remote.route(asked)
        for one in decision["candidates"]:
            numbers = "  ".join(
                f"{name} {one[name]:.3f}"
                for name in ("score", "similarity", "probability")
                if one[name] is not None
            )
            typer.echo(f"{one['weight'] or 0:6.2f}  {one['id']:<32}  {numbers}")
        typer.echo(
            f"{decision['reason']} (threshold {decision['threshold']:.3f}, margin {decision['margin']:.3f})"
        )

    def _again(self) -> None:
        while self.messages and self.messages[-1]["role"] != "user":
            self.messages.pop()
        if not self.messages:
            raise RemoteError("nothing has been asked yet")
        self._answer()

    def _answer(self) -> None:
        """Ask with the whole conversation; a message that gets no answer is taken back."""
        before = [] if self.system is None else [{"role": "system", "content": self.system}]
        said: list[str] = []
        try:
            answer = self.remote.chat(self.model, [*before, *self.messages], **self.fields)
            with closing(answer):
                self._print(answer, said)
        except KeyboardInterrupt:
            typer.echo(" (stopped)")
        except RemoteError:
            if said:
                typer.echo()
            raise
        else:
            typer.secho(numbers_line(answer), dim=True)
        finally:
            if said:
                self.messages.append({"role": "assistant", "content": "".join(said)})
            else:
                self.messages.pop()

    def _print(self, answer: Answer, said: list[str]) -> None:
        """The experts, then the pieces as they come."""
        for piece in answer.text():
            if not said:
                typer.secho(experts_line(answer.loramux), dim=True)
            said.append(piece)
            typer.echo(printable(piece), nl=False)
        typer.echo("" if said else f"{experts_line(answer.loramux)} said nothing")


def experts_line(loramux: dict[str, Any]) -> str:
    """`select-table 0.99, card-transfer 0.01`, or that the base answers, and whether nothing fitted."""
    route = loramux.get("route", {})
    experts = route.get("experts", [])
    if not experts:
        return "[the base: no expert fits]" if route.get("fallback") else "[the base]"
    shares = (one["id"] if one["weight"] is None else f"{one['id']} {one['weight']:.2f}" for one in experts)
    return f"[{', '.join(shares)}]"


def numbers_line(answer: Answer) -> str:
    """Tokens, speed and the time to the first, as far as they are known."""
    parts = []
    if tokens := answer.usage.get("completion_tokens"):
        parts.append(f"{tokens} token{'' if tokens == 1 else 's'}")
    if answer.speed is not None:
        parts.append(f"{answer.speed:.0f} a second")
    if answer.first is not None:
        parts.append(f"first after {answer.first:.2f} s")
    if answer.finish == "length":
        parts.append("cut at max tokens")
    return "; ".join(parts)


def printable(text: str) -> str:
    """Without control characters: what a model says must not steer the terminal."""
    return "".join(
        char
        for char in text
        if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cf") or char == "\u200d"
    )


def _line() -> str:
    return input("> ")
