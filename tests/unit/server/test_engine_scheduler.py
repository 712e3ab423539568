"""The ledger of pages and the choice of a step, without a model."""

import random

import pytest

from loramux.server.engine.pages import Pages
from loramux.server.engine.protocol import Sampling, TokenScore, Work
from loramux.server.engine.scheduler import (
    LEAST_CHUNK,
    LEAST_CHUNK_ON_DEVICE,
    STRETCH,
    Chunk,
    Scheduler,
    Tempo,
)
from loramux.server.engine.sequence import Sequence
from tests.tiny import NOWHERE


def make(name: str, prompt: int, tokens: int = 20, first: int = 5) -> Sequence:
    work = Work(name, tuple(range(first, first + prompt)), Sampling(tokens))
    return Sequence(work, frozenset(), NOWHERE)


def run(scheduler: Scheduler, chunks: list[Chunk]) -> None:
    """As a step does: everything is computed, and whoever is complete gets a token."""
    scheduler.done(chunks)
    for chunk in chunks:
        sequence = chunk.sequence
        if sequence.computed == len(sequence.tokens):
            sequence.accept(TokenScore(7))
            if sequence.finished:
                scheduler.remove(sequence)


def test_random_traffic_ends_with_every_answer_and_every_page_free() -> None:
    for seed in range(30):
        chance = random.Random(seed)
        pages = Pages(chance.randint(12, 40), chance.choice([1, 4, 8]), sharing=chance.random() < 0.7)
        scheduler = Scheduler(pages, max_running=chance.randint(1, 6), max_tokens=chance.randint(6, 40))
        most = pages.count * pages.size
        left = [
            make(f"{n}", chance.randint(1, most // 2), chance.randint(0, most // 3), chance.choice([5, 5, 6]))
            for n in range(25)
        ]
        everyone = list(left)
        gone: list[Sequence] = []
        for _ in range(10_000):
            if left and chance.random() < 0.3:
                scheduler.add(left.pop())
            if scheduler.running and chance.random() < 0.02:
                gone.append(chance.choice(scheduler.running))
                scheduler.remove(gone[-1])
            if scheduler.is_idle:
                if not left:
                    break
                continue
            chunks = scheduler.next()
            assert chunks, "somebody runs or waits, and nothing is computed"
            check(scheduler, chunks)
            run(scheduler, chunks)
        assert all(one.finished for one in everyone if one not in gone)
        assert pages.free == pages.count
        assert pages._users == [0] * pages.count


def check(scheduler: Scheduler, chunks: list[Chunk]) -> None:
    """No page is written by two, and whoever computes has pages for it."""
    pages = scheduler.pages
    assert sum(chunk.length for chunk in chunks) <= scheduler._max_tokens
    written: set[int] = set()
    for chunk in chunks:
        sequence = chunk.sequence
        assert chunk.length > 0
        assert chunk.start == sequence.computed
        assert len(sequence.pages) >= pages.needed(chunk.start + chunk.length)
        mine = set(sequence.pages[chunk.start // pages.size : pages.needed(chunk.start + chunk.length)])
        assert not mine & written
        assert all(pages._users[page] == 1 for page in mine), "a shared page is written to"
        written |= mine


def test_the_youngest_gives_way_and_starts_again_where_its_prefix_is_kept() -> None:
    pages = Pages(6, 4)
    scheduler = Scheduler(pages, max_running=4, max_tokens=64)
    old, young = make("old", 8, 12), make("young", 8, 12, first=100)
    scheduler.add(old)
    scheduler.add(young)
    while young in scheduler.running or not scheduler.running:
        run(scheduler, scheduler.next())
    assert old in scheduler.running
    assert list(scheduler.waiting) == [young]
    assert scheduler.preemptions == 1
    said = list(young.tokens)
    while not young.finished:
        run(scheduler, scheduler.next())
    assert young.tokens[: len(said)] == said
    assert young.generated == 12


def test_the_longest_unused_prefix_goes_first_and_of_one_sequence_its_end() -> None:
    pages = Pages(4, 2)
    scheduler = Scheduler(pages, max_running=1, max_tokens=64)
    for first in (10, 50):
        one = make(f"{first}", 4, 0, first)
        scheduler.add(one)
        run(scheduler, scheduler.next())
    taken: list[int] = []
    assert pages.grow(taken, 2)  # one page, of the four that hold prefixes
    found, _ = pages.match(b"", (10, 11, 12, 13))
    assert len(found) == 1
    pages.release(found)
    found, _ = pages.match(b"", (50, 51, 52, 53))
    assert len(found) == 2


def test_pages_that_held_something_are_taken_before_those_that_never_did() -> None:
    pages = Pages(8, 2)
    first: list[int] = []
    assert pages.grow(first, 6)
    pages.publish(first[0], b"a prefix")
    pages.release(first)
    again: list[int] = []
    assert pages.grow(again, 4)
    assert set(again) == set(first[1:])  # nothing new, and the prefix is kept
    assert pages.grow(again, 6)
    assert again[2] not in first


def test_prompts_join_in_pieces_that_stretch_a_step_no_further_than_agreed() -> None:
    decode = 0.1
    tempo = Tempo()
    assert tempo.allowance(8) is None  # nothing is known yet
    for prompt in (0, 0, 512, 40, 0, 300, 64, 17, 0):
        tempo.stepped(decode * (prompt == 0) + 0.004 * prompt, prompt, 0)
    assert tempo.allowance(0) is None
    assert tempo.allowance(8) == int((STRETCH - 1) * decode / 0.004)
    tempo.stepped(30.0, 128, 8)  # something was compiled
    assert tempo.allowance(8) == int((STRETCH - 1) * decode / 0.004)
    for _ in range(4):  # the further a prompt is, the more its tokens cost
        tempo.stepped(decode + 0.008 * 64, 64, 8)
    assert decode + 0.008 * (tempo.allowance(8) or 0) == pytest.approx(STRETCH * decode, rel=0.05)


def test_a_step_that_costs_the_same_however_small_is_not_made_small() -> None:
    """On a device a step of prompts is launched piece by piece: 30 ms, beside 3 ms for a captured one. Pieces
    once became smaller the longer that lasted, until sixteen short prompts took nine seconds."""
    tempo = Tempo(LEAST_CHUNK_ON_DEVICE)
    tempo.stepped(0.003, 0, 16)
    size = 512
    for _ in range(40):
        tempo.stepped(0.030 + 2e-5 * size, size, 16)
        size = min(512, tempo.allowance(16) or 512)
    assert size == LEAST_CHUNK_ON_DEVICE


def test_a_prompt_beside_answers_is_cut_and_alone_is_not() -> None:
    scheduler = Scheduler(Pages(200, 8), max_running=4, max_tokens=256)
    scheduler.tempo.stepped(0.1, 0, 4)
    for size in (256, 100):
        scheduler.tempo.stepped(0.01 * size, size, 0)
    first = make("first", 300)
    scheduler.add(first)
    assert [chunk.length for chunk in scheduler.next()] == [256]
    run(scheduler, [Chunk(first, 0, 256)])
    run(scheduler, scheduler.next())
    scheduler.add(make("second", 300, first=1000))
    lengths = [chunk.length for chunk in scheduler.next()]
    assert lengths[0] == 1
    assert LEAST_CHUNK <= lengths[1] <= 25
