"""Grammars of calls: the model has to call, and what it calls and with what is as the tools say."""

from collections.abc import Mapping, Sequence
from typing import Any

from loramux.server.text.grammar import GrammarSyntaxError, json_rule, quoted, structure_rule
from loramux.server.text.tool_formats import FormatName
from loramux.server.wire.structured import Structure

#: Calls of one answer, at most.
MOST_CALLS = 16


def calls_grammar(
    form: FormatName,
    tools: Sequence[Mapping[str, Any]],
    special: Mapping[str, int],
    *,
    parallel: bool,
    otherwise: Structure | None = None,
) -> str:
    """A Lark grammar of one call, or of several where they may be `parallel`.

    Args:
        form: how calls are written.
        tools: what may be called, as chat templates take them.
        special: ids of special tokens by their text; a marker among them is that token.
        otherwise: what the answer may be instead of calls.

    Raises:
        GrammarSyntaxError: `otherwise` is a grammar of its own.
    """

    def marker(text: str) -> str:
        return f"<[{special[text]}]>" if text in special else quoted(text)

    rules: list[str] = []
    for number, tool in enumerate(tools):
        function = tool["function"]
        rules += _call(form, number, function["name"], function["parameters"], marker)
    call = "(" + " | ".join(f"call_{number}" for number in range(len(tools))) + ")"

    def several(between: str) -> str:
        return f"{call} ({quoted(between)} {call}){{0,{MOST_CALLS - 1}}}" if parallel else call

    match form:
        case "llama3":
            calls = call
        case "mistral":
            calls = f'{marker("[TOOL_CALLS]")} "[" {several(", ")} "]"'
        case _:
            calls = several("\n")
    if otherwise is not None:
        rules.append(f"answer: {structure_rule(otherwise)}")
    return "\n".join([f"start: calls{' | answer' if otherwise else ''}", f"calls: {calls}", *rules])


def _call(form: FormatName, number: int, name: str, parameters: Mapping[str, Any], marker: Any) -> list[str]:
    """The rules of a call of one tool."""
    arguments = f"args_{number}: {json_rule(parameters)}"
    match form:
        case "hermes":
            head = f'{{"name": "{name}", "arguments": '
            body = f'"\\n" {quoted(head)} args_{number} "}}\\n"'
            return [f"call_{number}: {marker('<tool_call>')} {body} {marker('</tool_call>')}", arguments]
        case "qwen":
            body, rules = _tagged(number, parameters)
            head = quoted(f"\n<function={name}>\n")
            tail = quoted("</function>\n")
            return [
                f"call_{number}: {marker('<tool_call>')} {head} {body} {tail} {marker('</tool_call>')}",
                *rules,
            ]
    key = "parameters" if form == "llama3" else "arguments"
    head, tail = quoted(f'{{"name": "{name}", "{key}": '), quoted("}")
    return [f"call_{number}: {head} args_{number} {tail}", arguments]


def _tagged(number: int, parameters: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Parameters between tags, in the order of the schema: texts as they are, anything else as JSON."""
    required = parameters.get("required") or ()
    shared = {key: parameters[key] for key in ("$defs", "definitions") if key in parameters}
    parts: list[str] = []
    rules: list[str] = []
    for place, (key, schema) in enumerate(parameters.get("properties", {}).items()):
        rule = f"p_{number}_{place}"
        head, tail = quoted(f"<parameter={key}>\n"), quoted("\n</parameter>\n")
        if isinstance(schema, Mapping) and schema.get("type") == "string":
            if not schema.keys() & {"enum", "const", "pattern", "format"}:
                rules.append(f"{rule}: {head} text_{number}_{place}")
                rules.append(f"text_{number}_{place}[lazy]: /(.|\\n)*\\n<\\/parameter>\\n/")
            elif texts := schema.get("enum") or ([schema["const"]] if "const" in schema else None):
                rules.append(f"{rule}: {head} ({' | '.join(quoted(str(text)) for text in texts)}) {tail}")
            else:
                pattern = schema.get("pattern", ".*")
                raise GrammarSyntaxError(f"a pattern or format ({pattern!r}) is not supported in this format")
        else:
            rules.append(f"{rule}: {head} {json_rule({**schema, **shared})} {tail}")
        parts.append(rule if key in required else f"{rule}?")
    return " ".join(parts), rules
