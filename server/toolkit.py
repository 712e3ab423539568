"""Tools of a request: what the prompt says of them, the grammar of calls, and the reader of an answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loramux.server.errors import RequestError
from loramux.server.text.grammar import grammar_of
from loramux.server.text.tool_calls import CallParser
from loramux.server.text.tool_formats import ToolFormat, find_format, knows_tools, template_text
from loramux.server.text.tool_grammar import calls_grammar
from loramux.server.text.vocabulary import Vocabulary
from loramux.server.wire.structured import Structure
from loramux.server.wire.tools import Offer

# Of the end of a prompt, where an answer may have been begun for the model.
_PREFIX_TOKENS = 512


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools that one request may have called.

    Attributes:
        tools: as chat templates take them.
        must: whether there has to be a call; named: of this function.
        parallel: whether there may be several.
        visible: special tokens whose text the reader has to see.
        schemas_at: the name of the request's field with the schema of the tool of a number.
    """

    tools: tuple[Mapping[str, Any], ...]
    must: bool
    named: str | None
    parallel: bool
    form: ToolFormat
    visible: frozenset[int]
    schemas_at: str

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """Of the arguments of each tool."""
        return [tool["function"]["parameters"] for tool in self.tools]

    def reader(self, vocabulary: Vocabulary, prompt: Sequence[int]) -> CallParser:
        """A reader of one answer to a prompt."""
        end = b"".join(vocabulary.pieces.get(token, b"") for token in prompt[-_PREFIX_TOKENS:])
        prefix = self.form.answer_so_far(end.decode("utf-8", "replace"))
        return CallParser(self.form.template, self.tools, prefix, None if self.parallel else 1)


class Toolkit:
    """What the base of a server knows about tools."""

    def __init__(self, tokenizer: Any, vocabulary: Vocabulary, wanted: Any) -> None:
        """`wanted` is the setting `tools.format`."""
        self._knows = knows_tools(template_text(tokenizer.chat_template))
        self._form = find_format(tokenizer, wanted)
        self._special = {vocabulary.name(token): token for token in vocabulary.special}

    def use(self, offer: Offer) -> ToolUse | None:
        """The tools of a request; `None` where none may be called.

        Raises:
            RequestError: the base's chat template does not know tools, or how it writes calls is not known.
        """
        if not offer.functions or offer.choice == "none":
            return None
        if not self._knows:
            raise _refused(
                "the base's chat template does not know tools; tool_choice none leaves them out, and the "
                "server's setting chat_template takes another template"
            )
        if self._form is None:
            raise _refused("how the base writes calls is not known from its tokenizer; set tools.format")
        # Where one is named only that one can be called, but the prompt has all of them.
        return ToolUse(
            tuple(function.described() for function in offer.functions),
            must=offer.choice == "required",
            named=offer.named,
            parallel=offer.parallel,
            form=self._form,
            visible=frozenset(token for name, token in self._special.items() if name in self._form.markers),
            schemas_at=offer.schemas,
        )

    def grammar(self, use: ToolUse | None, structure: Structure | None) -> str | None:
        """The grammar of an answer that has to call, has to look like something, or has to do one of the two.

        Raises:
            RequestError: there has to be a grammar of calls, and how the base writes them has no name.
            GrammarSyntaxError: what is asked for is none.
        """
        if use is None or not (use.must or structure):
            return None if structure is None else grammar_of(structure)
        if use.form.name is None:
            param = "tool_choice" if structure is None or use.must else structure.param
            raise RequestError(
                f"{param}: how the base writes calls is not known well enough; set tools.format",
                param=param, code="unsupported_field",
            )  # fmt: skip
        named = [tool for tool in use.tools if tool["function"]["name"] == use.named]
        several = use.parallel and not named
        return calls_grammar(
            use.form.name,
            named or use.tools,
            self._special,
            parallel=several,
            otherwise=None if use.must else structure,
        )


def _refused(problem: str) -> RequestError:
    return RequestError(problem, param="tools", code="unsupported_field")
