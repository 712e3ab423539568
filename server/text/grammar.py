"""From what a client asks of its answer to a grammar in llguidance's form."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llguidance import LLMatcher, grammar_from, regex_to_lark

from loramux.server.engine.grammars import one_line
from loramux.server.wire.structured import Structure

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# Between the tokens of JSON: nothing, a blank, or a new line and its indentation. Were there no end to it, a
# model that falls into blanks would fill its answer with them.
_BLANKS = r"( |\r?\n[ \t]{0,12})?"
_JSON: "JsonCompileOptions" = {
    "whitespace_pattern": _BLANKS,
    "whitespace_flexible": True,
    "lenient": False,
    "coerce_one_of": False,
}
# What the grammar's syntax for texts does not take as it is.
_CONTROLS = {code: f"\\u{code:04x}" for code in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)}


_EBNF_RULE = re.compile(r"^\s*[\w-]+\s*::=", re.MULTILINE)


class GrammarSyntaxError(ValueError):
    """A text that is no grammar; one line."""


def grammar_of(structure: Structure) -> str:
    """The grammar of what a request asks for.

    Raises:
        GrammarSyntaxError: it is none.
    """
    match structure.kind:
        case "json":
            return json_grammar(structure.given)
        case "regex":
            return regex_grammar(structure.given)
        case "choice":
            return choice_grammar(structure.given)
    return written_grammar(structure.given)


def json_grammar(schema: dict[str, Any]) -> str:
    """JSON that a schema describes, its properties in the order of the schema.

    Raises:
        GrammarSyntaxError: the schema is nested deeper than can be read.
    """
    try:
        return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_JSON)
    except (ValueError, RecursionError) as error:
        raise GrammarSyntaxError(one_line(str(error))) from None


def json_rule(schema: Mapping[str, Any]) -> str:
    """The same as a part of a Lark grammar."""
    return f"%json {json.dumps({**schema, 'x-guidance': _JSON})}"


def structure_rule(structure: Structure) -> str:
    """What a request asks for as a part of a Lark grammar.

    Raises:
        GrammarSyntaxError: it is a whole grammar itself.
    """
    match structure.kind:
        case "json":
            return json_rule(structure.given)
        case "regex":
            return f"/{regex_to_lark(structure.given, 'dw')}/"
        case "choice":
            return " | ".join(map(quoted, structure.given))
    raise GrammarSyntaxError("a grammar cannot be combined with tools")


def regex_grammar(regex: str) -> str:
    """Texts that a regular expression matches as a whole: Rust's syntax, without look-around; digits and word
    characters are ASCII, as in the patterns of a schema."""
    return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(regex, 'dw')}/")


def choice_grammar(choices: Sequence[str]) -> str:
    """One of some texts."""
    return LLMatcher.grammar_from_lark("start: " + " | ".join(map(quoted, choices)))


def written_grammar(text: str) -> str:
    """Lark's syntax, or EBNF as llama.cpp writes it, where a rule is `root ::= ...`.

    Raises:
        GrammarSyntaxError: it is neither.
    """
    try:
        return grammar_from("gbnf" if _EBNF_RULE.search(text) else "lark", text)
    except (ValueError, RecursionError) as error:
        raise GrammarSyntaxError(one_line(str(error))) from None


def quoted(text: str) -> str:
    """A text as a literal of a Lark grammar."""
    return json.dumps(text, ensure_ascii=False).translate(_CONTROLS)
