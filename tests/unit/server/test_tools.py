"""Calls as models write them: found by the parser, and forced by the grammar."""

import asyncio
import json
import random
from typing import Any

import numpy as np
import pytest
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from loramux.server.engine.grammars import Grammars
from loramux.server.text.grammar import GrammarSyntaxError
from loramux.server.text.tool_calls import CallParser, Said, ToolCall
from loramux.server.text.tool_formats import TEMPLATES, find_format, knows_tools, spoken_of
from loramux.server.text.tool_grammar import MOST_CALLS, calls_grammar
from loramux.server.text.vocabulary import Vocabulary
from loramux.server.toolkit import Toolkit, ToolUse
from loramux.server.wire.structured import Structure
from loramux.server.wire.tools import Tool, ToolFields
from tests.kit import CHAT_TEMPLATE
from tests.tool_kit import MARKERS, TOOLS, template, tool_tokenizer

FORMS: Any = tuple(TEMPLATES)
DESCRIBED = [Tool.model_validate(tool).function.described() for tool in TOOLS]
WEATHER = {"city": "Köln", "days": 3}
WRITTEN = {
    "hermes": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln", "days": 3}}\n</tool_call>\n'
    '<tool_call>{"name": "now", "arguments": {}}</tool_call>',
    "llama3": '{"name": "get_weather", "parameters": {"city": "Köln", "days": "3"}}',
    "mistral": '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Köln", "days": 3}}, '
    '{"name": "now", "arguments": {}}]',
    "qwen": "<tool_call>\n<function=get_weather>\n<parameter=city>\nKöln\n</parameter>\n<parameter=days>\n3\n"
    "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
}


def parsed(form: str, text: str, size: int, *, prefix: str = "", most: int | None = None) -> Said:
    """What comes of a text in pieces of some size."""
    parser = CallParser(TEMPLATES[form], DESCRIBED, prefix, most)  # type: ignore[index]
    said = Said()
    for start in range(0, len(text), size):
        said += parser.feed(text[start : start + size])
    said += parser.finish()
    assert parser.calls == len(said.calls)
    assert parser.ending("stop") == ("tool_calls" if said.calls else "stop")
    assert parser.ending("length") == "length"
    return said


def simple(calls: tuple[ToolCall, ...]) -> list[tuple[str, Any]]:
    assert [call.index for call in calls] == list(range(len(calls)))
    assert len({call.id for call in calls}) == len(calls)
    return [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("form", FORMS)
def test_calls_are_found_however_the_text_is_cut(form: str, size: int) -> None:
    said = parsed(form, WRITTEN[form], size)
    assert said.text == ""
    assert simple(said.calls) == [("get_weather", WEATHER), ("now", {})][: len(said.calls)]
    assert len(said.calls) == (1 if form == "llama3" else 2)
    assert "Köln" in said.calls[0].arguments
    if form != "llama3":
        assert parsed(form, "Let me see." + WRITTEN[form], size).text == "Let me see."
        assert len(parsed(form, WRITTEN[form], size, most=1).calls) == 1


@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "text",
    ["", "Just a text.", "  \n indented, with <tags> and [brackets", '{"a": 1}', "<tool_cal", "a [TOOL_"],
)
def test_a_text_without_calls_stays_as_it_is(form: str, text: str, size: int) -> None:
    assert parsed(form, text, size) == Said(text)


@pytest.mark.parametrize("size", [1, 9, 1000])
@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("hermes", "<tool_call>{bad</tool_call> and on"),
        ("hermes", '<tool_call>{"name": "now", "argum'),
        ("hermes", "<tool_call>[1, 2]</tool_call>"),
        ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "now", "arguments": "x"}</tool_call>!'),
        ("llama3", '{"name": "now"}'),
        ("mistral", '[TOOL_CALLS]{"name": "now"'),
    ],
)
def test_what_only_looks_like_a_call_is_shown_as_it_was_written(form: str, text: str, size: int) -> None:
    assert parsed(form, text, size) == Said(text)


def test_an_answer_that_the_prompt_has_begun_goes_on() -> None:
    form = find_format(tool_tokenizer("hermes"), "auto")
    assert form is not None
    prompt = "<|im_start|>user\n<tool_call>x<|im_end|><|im_start|>assistant\n<tool_call>"
    assert form.answer_so_far(prompt) == "<tool_call>"
    assert form.answer_so_far("no beginning of a turn <tool_call>") == ""
    said = parsed(
        "hermes", '{"name": "now", "arguments": {}}</tool_call>', 3, prefix=form.answer_so_far(prompt)
    )
    assert simple(said.calls) == [("now", {})]


@pytest.mark.parametrize("form", FORMS)
def test_the_format_is_told_from_the_chat_template_or_named(form: str) -> None:
    tokenizer = tool_tokenizer(form)
    found = find_format(tokenizer, "auto")
    assert found is not None
    assert found.name == form
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "tool_use": template(form)}
    assert find_format(tokenizer, "auto") == found
    tokenizer.chat_template = CHAT_TEMPLATE
    assert find_format(tokenizer, "auto") is None
    assert find_format(tokenizer, form) == found  # type: ignore[arg-type]
    own = {"start_anchor": "x", "fields": {"content": {"content": "text"}}}
    tokenizer.response_template = own
    found = find_format(tokenizer, "auto")
    assert found is not None
    assert (found.name, found.template) == (None, own)


def test_which_templates_know_tools() -> None:
    assert all(knows_tools(template(form)) for form in FORMS)
    assert not knows_tools(CHAT_TEMPLATE)
    assert not knows_tools("we have tools: {{ messages }}")
    assert spoken_of("[TOOL_CALLS]f[ARGS]{}") is None


def walk(grammars: Grammars, grammar: str, chooser: random.Random) -> list[int]:
    """Tokens that a model which knows nothing chooses under a grammar."""
    matcher = asyncio.run(grammars.matcher(grammar))
    mask = allocate_token_bitmask(1, grammars.width)
    tokens: list[int] = []
    while not matcher.is_stopped():
        fill_next_token_bitmask(matcher, mask)
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
        token = chooser.choice(np.nonzero(bits)[0].tolist())
        assert matcher.consume_token(token)
        if token not in grammars.eos_ids:
            tokens.append(token)
    return tokens


def used(form: str, **fields: Any) -> tuple[Toolkit, ToolUse, Any]:
    tokenizer = tool_tokenizer(form)
    toolkit = Toolkit(tokenizer, Vocabulary.from_tokenizer(tokenizer), "auto")
    use = toolkit.use(
        ToolFields.model_construct(tools=[Tool.model_validate(tool) for tool in TOOLS], **fields).offer
    )
    assert use is not None
    return toolkit, use, tokenizer


def read(use: ToolUse, tokenizer: Any, tokens: list[int]) -> Said:
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    parser = use.reader(vocabulary, (1, 2, 3))
    text = b"".join(
        vocabulary.pieces[token] if token in use.visible else vocabulary.text_bytes(token) for token in tokens
    ).decode()
    return parser.feed(text) + parser.finish()


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_whatever_a_model_says_under_the_grammar_is_a_call_as_the_tools_have_it(
    form: str, parallel: bool
) -> None:
    toolkit, use, tokenizer = used(form, tool_choice="required", parallel_tool_calls=parallel)
    grammars = Grammars(tokenizer, ())
    grammar = toolkit.grammar(use, None)
    assert grammar is not None
    chooser, counts, names = random.Random(5), set(), set()
    for _ in range(30):
        tokens = walk(grammars, grammar, chooser)
        special = [tokenizer.convert_ids_to_tokens(token) for token in tokens if token in use.visible]
        assert special == list(MARKERS[form] if form == "mistral" else ())
        said = read(use, tokenizer, tokens)
        assert said.text == ""
        counts.add(len(said.calls))
        for name, arguments in simple(said.calls):
            names.add(name)
            if name == "now":
                assert arguments == {}
                continue
            assert name == "get_weather"
            assert arguments["city"] in ("Köln", "Rome")
            assert arguments["days"] in range(10)
            assert set(arguments) <= {"city", "days", "at"}
    assert names == {"now", "get_weather"}
    assert max(counts) <= MOST_CALLS
    assert min(counts) == 1
    assert (max(counts) > 1) == (parallel and form != "llama3")


def test_a_call_or_an_answer_of_a_form() -> None:
    toolkit, use, tokenizer = used("hermes", tool_choice="auto")
    grammars = Grammars(tokenizer, ())
    assert toolkit.grammar(use, None) is None
    for structure, texts in (
        (Structure("json", {"enum": ["on", 5]}, "x"), {'"on"', "5"}),
        (Structure("regex", "a|b", "x"), {"a", "b"}),
        (Structure("choice", ["yes", "<no>"], "x"), {"yes", "<no>"}),
    ):
        grammar = toolkit.grammar(use, structure)
        assert grammar is not None
        found = [read(use, tokenizer, walk(grammars, grammar, random.Random(seed))) for seed in range(30)]
        assert {said.text for said in found} == {"", *texts}
        assert all(bool(said.calls) != bool(said.text) for said in found)
    with pytest.raises(GrammarSyntaxError, match="cannot be combined with tools"):
        toolkit.grammar(use, Structure("grammar", "start: /a/", "x"))


def test_texts_of_the_qwen_format_may_hold_anything_but_their_end() -> None:
    tool = {"function": {"name": "f", "parameters": {
        "type": "object", "properties": {"code": {"type": "string"}, "k": {"type": "string", "const": "v"}},
        "required": ["code", "k"],
    }}}  # fmt: skip
    grammars = Grammars(tool_tokenizer("qwen"), ())
    grammar = calls_grammar("qwen", [tool], {}, parallel=False)
    matcher = asyncio.run(grammars.matcher(grammar))
    text = (
        "<tool_call>\n<function=f>\n<parameter=code>\nif a < b:\n  </p>\n\n</parameter>\n"
        "<parameter=k>\nv\n</parameter>\n</function>\n</tool_call>"
    )
    assert matcher.consume_tokens(list(grammars._known().tokenize_str(text)))
    assert matcher.is_stopped()
    assert not matcher.is_error()
    patterned = {"function": {"name": "f", "parameters": {
        "properties": {"code": {"type": "string", "pattern": "a"}}}}}  # fmt: skip
    with pytest.raises(GrammarSyntaxError, match="pattern"):
        calls_grammar("qwen", [patterned], {}, parallel=False)
