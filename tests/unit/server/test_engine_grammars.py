"""Grammars in the engine: what masks allow and refuse, and answers under them in every kind of batch."""

import asyncio
import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from llguidance._lib import LLParserLimits

from loramux.server.engine.grammars import KEPT, Grammars, one_line
from loramux.server.engine.masks import Masks, unpacked
from loramux.server.engine.protocol import EngineError, GrammarError, Sampling, Work
from loramux.server.engine.sampler import Sampler
from loramux.server.engine.scheduler import Chunk
from loramux.server.engine.sequence import Sequence
from loramux.server.text.grammar import choice_grammar, json_grammar, regex_grammar
from loramux.server.text.vocabulary import Vocabulary
from tests.kit import byte_tokenizer
from tests.tiny import NOWHERE, Answer, Rig, random_experts, running, tiny_llama

TOKENIZER = byte_tokenizer((("t", "h"), ("th", "e"), ("a", "b"), ("ab", "a"), ("b", "x"), ("1", "1")))
VOCABULARY = Vocabulary.from_tokenizer(TOKENIZER)
SIZE = len(TOKENIZER)
END: int = TOKENIZER.eos_token_id
CPU = torch.device("cpu")


def text_of(tokens: list[int]) -> str:
    return b"".join(map(VOCABULARY.text_bytes, tokens)).decode("utf-8", "replace")


def constrained(grammar: str, grammars: Grammars, **sampling: Any) -> Sequence:
    chosen = Sampling(**{"max_tokens": 99, "temperature": 0.0, **sampling})
    matcher = asyncio.run(grammars.matcher(grammar))
    work = Work("w", (1,), chosen, grammar=grammar)
    return Sequence(work, grammars.eos_ids | chosen.stop_token_ids, NOWHERE, matcher)


def whole(sequence: Sequence) -> Chunk:
    return Chunk(sequence, 0, len(sequence.tokens))


def allowed(sequence: Sequence, grammars: Grammars) -> set[int]:
    masks, logits = Masks(grammars, 1, CPU), torch.zeros(1, SIZE)
    masks.begin([whole(sequence)])
    masks.apply_(logits, [0])
    masks.close()
    assert set(logits.unique().tolist()) <= {0.0, -torch.inf}
    return set(torch.nonzero(logits[0] == 0).flatten().tolist())


LANGUAGES = {
    "regex": regex_grammar("(ab|the|bx1?){1,2}"),
    "choice": choice_grammar(["the", "then", "a", "aba", "é", 'b"x']),
    "schema": json_grammar({"enum": ["ab", 11, None, True]}),
}
WORDS = ("ab", "the", "bx", "bx1")
STRINGS = {
    "regex": {*WORDS, *(a + b for a in WORDS for b in WORDS)},
    "choice": {"the", "then", "a", "aba", "é", 'b"x'},
    "schema": {'"ab"', "11", "null", "true"},
}


@pytest.mark.parametrize("name", STRINGS)
def test_a_mask_allows_every_token_that_leads_to_a_text_of_the_language_and_no_other(name: str) -> None:
    """Against the language written out, from every place that tokens can lead to."""
    grammars = Grammars(TOKENIZER, ())
    language = {text.encode() for text in STRINGS[name]}
    places: list[list[int]] = [[]]
    seen: set[bytes] = set()
    while places:
        place = places.pop()
        said = b"".join(map(VOCABULARY.text_bytes, place))
        if said in seen:
            continue
        seen.add(said)
        sequence = constrained(LANGUAGES[name], grammars)
        assert sequence.matcher is not None
        assert all(sequence.matcher.consume_token(token) for token in place)
        found = allowed(sequence, grammars)
        expected = {
            token
            for token in range(SIZE)
            if (piece := VOCABULARY.text_bytes(token))
            and any(text.startswith(said + piece) for text in language)
        } | ({END} if said in language else set())
        # Where there is one way on, its usual tokens are enough.
        forced = sum(text.startswith(said) for text in language) == 1
        assert found == expected or (forced and found and found < expected), said
        places += [[*place, token] for token in found - {END}]
    assert len(seen) > 5


@pytest.mark.parametrize("long", [0.0, 60.0])
@pytest.mark.parametrize("compiled", [True, False])
def test_masks_of_some_rows_change_those_alone(
    monkeypatch: pytest.MonkeyPatch, long: float, compiled: bool
) -> None:
    """One after the other and with all cores, by our kernel and by torch."""
    monkeypatch.setattr("loramux.server.engine.masks._LONG", long)
    if not compiled:
        monkeypatch.setattr("loramux.server.engine.masks.takes", lambda _: False)
    grammars = Grammars(TOKENIZER, (), SIZE + 40)
    rows = [constrained(regex_grammar(one), grammars) for one in ("a+", "[0-9]", "é")]
    masks = Masks(grammars, 4, CPU)
    masks.begin([whole(row) for row in rows])
    logits = torch.randn(6, SIZE + 70)
    before = logits.clone()
    masks.apply_(logits, [5, 0, 3])
    assert torch.equal(logits[[1, 2, 4]], before[[1, 2, 4]])
    for row, sequence in zip((5, 0, 3), rows, strict=True):
        kept = set(torch.nonzero(logits[row] > -torch.inf).flatten().tolist())
        assert kept == allowed(sequence, grammars)
        at = sorted(kept)
        assert torch.equal(logits[row, at], before[row, at])
    # Narrower logits than the mask: a head without the tokens that were added later.
    masks.begin([whole(rows[1])])
    narrow = torch.zeros(1, 100)
    masks.apply_(narrow, [0])
    assert set(torch.nonzero(narrow[0] == 0).flatten().tolist()) == {
        token for token in allowed(rows[1], grammars) if token < 100
    }
    masks.close()


def test_bits_are_unpacked_on_a_device_as_they_are_on_the_host() -> None:
    bits = np.random.default_rng(3).integers(-(2**31), 2**31, (5, 9), dtype=np.int64).astype(np.int32)
    on_host = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little") == 0
    assert np.array_equal(unpacked(torch.from_numpy(bits)).numpy(), on_host)


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 2.0, "top_k": 400},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 0.5, "top_p": 0.1},
        {"temperature": 1.5, "top_k": 5, "top_p": 0.9, "min_p": 0.3},
        {"temperature": 1.0, "logit_bias": {0: 100.0, 1: 100.0}, "presence_penalty": 2.0},
        {"repetition_penalty": 5.0, "frequency_penalty": 2.0},
    ],
)
def test_whatever_the_sampling_a_token_is_one_that_the_mask_allows(sampling: dict[str, Any]) -> None:
    grammars = Grammars(TOKENIZER, ())
    sequence = constrained(regex_grammar("([0-9]{2}|the){3}"), grammars, seed=4, logprobs=2, **sampling)
    sampler, masks = Sampler(), Masks(grammars, 2, CPU)
    while not sequence.finished:
        possible = allowed(sequence, grammars)
        logits = torch.randn(1, SIZE) * 4
        masks.begin([whole(sequence)])
        [score] = sampler.choose(logits, [sequence], logits.argmax(-1), masks=masks)
        assert score is not None
        assert score.id in possible
        # Of the model as it is, whatever the grammar says.
        logprobs = logits[0].log_softmax(-1)
        assert score.logprob == pytest.approx(float(logprobs[score.id]))
        assert [token for token, _ in score.top] == logits[0].topk(2).indices.tolist()
        assert sequence.follow(score.id) is None
        sequence.accept(score)
    assert re.fullmatch("([0-9]{2}|the){3}", text_of(sequence.tokens[1:]))
    masks.close()


def test_a_row_for_which_nothing_is_left_says_so() -> None:
    grammars = Grammars(TOKENIZER, ())
    for sampling in ({}, {"temperature": 1.0}):
        sequence = constrained(regex_grammar("[0-9]"), grammars, **sampling)
        logits = torch.zeros(1, SIZE)
        logits[0, sorted(allowed(sequence, grammars))] = -torch.inf
        masks = Masks(grammars, 1, CPU)
        masks.begin([whole(sequence)])
        [score] = Sampler().choose(logits, [sequence], masks=masks)
        masks.close()
        if sampling:  # the distribution is not finite
            assert score is None
        else:
            assert score is not None
            assert "no token follows the grammar" in (sequence.follow(score.id) or "")


PATTERNS = [None, "(the|ab|[0-9]){4,9}", None, "[^a-z]{8}", "(bx)*1", '"[^"]{0,12}"', "(é|b){5}", "a{30}"]


def patterned(number: int) -> str | None:
    pattern = PATTERNS[number % len(PATTERNS)]
    return None if pattern is None else regex_grammar(pattern)


async def asked(rig: Rig, number: int) -> Answer:
    options: dict[str, Any] = {"temperature": 0.0} if number % 3 else {"temperature": 1.2, "seed": number}
    prompt = torch.randint(3, 256, (5 + number,), generator=torch.Generator().manual_seed(number)).tolist()
    blends = ({}, {"a": 1.0}, {"a": 0.5, "b": 0.5})
    return await rig.ask(prompt, blends[number % 3], grammar=patterned(number), max_tokens=24, **options)


def check(answers: list[Answer]) -> None:
    for number, answer in enumerate(answers):
        pattern = PATTERNS[number % len(PATTERNS)]
        if pattern is None:
            assert len(answer.tokens) == 24
        elif answer.finished.reason == "stop":
            assert re.fullmatch(pattern, text_of(answer.tokens))
        else:
            assert len(answer.tokens) == 24
    ended = [one.finished.reason for one in answers]
    assert ended.count("stop") > len(answers) / 3


def test_a_batch_with_and_without_grammars_says_what_each_says_alone() -> None:
    """Also where the cache is too small for all, so that answers are given up and computed again, and where
    decode steps are captured with their draws."""
    model = tiny_llama(vocab_size=SIZE)
    experts = random_experts(model, (4, 3))

    async def scenario(together: bool, **limits: Any) -> tuple[list[Answer], int]:
        grammars = Grammars(TOKENIZER, (), SIZE)
        async with running(model, experts, grammars=grammars, eos_ids=(), **limits) as rig:
            if together:
                # Compiled before: a request whose grammar has to be comes later than the others.
                for pattern in filter(None, map(patterned, range(12))):
                    await grammars.check(pattern)
                answers = await asyncio.gather(*(asked(rig, number) for number in range(12)))
            else:
                answers = [await asked(rig, number) for number in range(12)]
            return answers, rig.engine.stats().prefill_tokens

    alone, tokens = asyncio.run(scenario(False))
    check(alone)
    expected = [(one.tokens, one.finished) for one in alone]
    for limits in ({}, {"graphs": True}):
        batch, _ = asyncio.run(scenario(True, **limits))
        assert [(one.tokens, one.finished) for one in batch] == expected
    crowded, again = asyncio.run(scenario(True, kv_tokens=120, prefix_sharing=False))
    assert again > tokens, "nothing was computed twice"
    assert [(one.tokens, one.finished) for one in crowded] == expected


def test_the_end_of_a_grammar_is_the_end_of_the_answer() -> None:
    model = tiny_llama(vocab_size=SIZE)

    async def scenario() -> None:
        async with running(model, grammars=Grammars(TOKENIZER, (), SIZE)) as rig:

            async def ask(pattern: str, **options: Any) -> Answer:
                return await rig.ask((5, 6), grammar=regex_grammar(pattern), **options)

            exact = await ask("[0-9]{6}", max_tokens=6)
            assert (exact.finished.reason, exact.finished.stop_token) == ("stop", None)
            assert (await ask("[0-9]{60}", max_tokens=4)).finished.reason == "length"
            assert (await ask("")).tokens == []
            # An end that the model chooses: the end token, also where it is to be ignored.
            for ignore_eos in (False, True):
                chosen = await ask("a*", logit_bias={END: 100.0}, ignore_eos=ignore_eos, logprobs=0)
                assert (chosen.tokens, chosen.finished.stop_token) == ([], END)
                assert chosen.finished.score is not None
            longest = await ask("a*", logit_bias={END: -100.0}, max_tokens=9)
            assert text_of(longest.tokens) == "a" * sum(map(len, map(VOCABULARY.text_bytes, longest.tokens)))
            assert longest.finished.reason == "length"
            stopped = await ask("[0-9]{6}", stop_token_ids=frozenset(range(SIZE)))
            assert stopped.tokens == []
            scored = await ask("ab", max_tokens=0, prompt_logprobs=0)
            assert scored.finished.reason == "length"

    asyncio.run(scenario())


def test_a_grammar_that_becomes_too_much_ends_its_own_answer_alone() -> None:
    model = tiny_llama(vocab_size=SIZE)
    few = LLParserLimits(max_lexer_states=40, verbose_errors=False)
    deep = regex_grammar("[ab]*a[ab]{9}c")

    async def scenario() -> None:
        grammars = Grammars(TOKENIZER, (), SIZE, limits=few)
        async with running(model, grammars=grammars) as rig:
            # Without an end the states grow until there are too many.
            no_end = {TOKENIZER("c")["input_ids"][0]: -100.0}
            options: dict[str, Any] = {"temperature": 2.0, "max_tokens": 200, "logit_bias": no_end}
            results = await asyncio.gather(
                rig.ask((5, 6), grammar=deep, seed=1, **options),
                rig.ask((5, 6), max_tokens=40),
                rig.ask((5, 6), grammar=regex_grammar("[0-9]{9}")),
                return_exceptions=True,
            )
            failed, free, fine = results
            assert isinstance(failed, GrammarError)
            assert "too many states" in str(failed)
            assert "\n" not in str(failed)
            assert isinstance(free, Answer)
            assert len(free.tokens) == 40
            assert isinstance(fine, Answer)
            assert fine.finished.reason == "stop"
            # What the copies have in common was dropped with it: the next one begins anew.
            again = await rig.ask((5, 6), grammar=deep, max_tokens=2)
            assert len(again.tokens) == 2

    asyncio.run(scenario())


def test_compiled_grammars_are_kept_within_bounds_and_copies_share_no_state() -> None:
    grammars = Grammars(TOKENIZER, ())

    async def scenario() -> None:
        first, second = [await grammars.matcher(regex_grammar("ab")) for _ in range(2)]
        assert first.consume_token(TOKENIZER("a")["input_ids"][0])
        assert second.compute_ff_bytes() == b"ab"
        for number in range(2 * KEPT):
            await grammars.check(regex_grammar(f"a{{{number}}}"))
        assert len(grammars._compiled) == KEPT
        await grammars.check(choice_grammar(["x" * 600_000]))
        await grammars.check(choice_grammar(["y" * 600_000]))
        assert len(grammars._compiled) == 1

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (json_grammar({"not": {}, "if": {}}), "the JSON Schema keywords if, not are not supported"),
        (regex_grammar("(a"), "unclosed group"),
        ("", "Empty"),
        ("start: " + "(" * 9000, "deep"),
    ],
)
def test_what_does_not_compile_is_a_line_that_says_why(grammar: str, words: str) -> None:
    with pytest.raises(GrammarError, match=words) as caught:
        asyncio.run(Grammars(TOKENIZER, ()).check(grammar))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_an_engine_without_grammars_and_a_tokenizer_that_has_none_say_so() -> None:
    async def scenario() -> None:
        async with running(tiny_llama()) as rig:
            with pytest.raises(GrammarError, match="without grammars"):
                await rig.ask((5, 6), grammar=regex_grammar("a"))
        with pytest.raises(GrammarError, match=r"the base's tokenizer allows no grammars: .*fast"):
            await Grammars(object(), ()).check(regex_grammar("a"))

    asyncio.run(scenario())


def test_one_line_of_a_long_message() -> None:
    assert one_line('Unimplemented keys: ["a", "b"]') == "the JSON Schema keywords a, b are not supported"
    assert one_line("x\n   y\n  1 | start: x\n   ^") == "x y"
    assert len(one_line("z" * 5000)) < 320
    assert issubclass(GrammarError, EngineError)
    assert json.loads(json_grammar({"type": "object"}))
