"""What passes between an edge and a replica comes out as it went in."""

import json
import random
import socket
import threading

import pytest
import torch

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.blend import EXACT_GRID, METHOD_OPTIONS, Blend
from loramux.adapters.errors import AdapterError, BlendError
from loramux.adapters.sparse.kind import Kind
from loramux.adapters.sparse.shelf import SparseCard
from loramux.adapters.sparse.token_mixtures import TokenMethod, TokenMixture
from loramux.server.edge.failures import describe
from loramux.server.engine.protocol import (
    EngineClosed,
    EngineError,
    EngineExhausted,
    EngineOverloaded,
    Finished,
    GrammarError,
    PromptScored,
    Sampling,
    Started,
    Token,
    TokenScore,
    Work,
)
from loramux.server.leases import SparseChoice
from loramux.server.replicas import frames
from loramux.server.replicas.codec import (
    error_body,
    error_of,
    event_body,
    event_of,
    mixture_body,
    mixture_of,
    work_body,
    work_of,
)
from loramux.server.replicas.outline import card_body, card_of, outlined, outlines
from tests.tiny import random_adapter

SHAPES = BaseShapes("tiny", {"q": (8, 8), "up": (24, 16), "down": (16, 24), "k": (8, 8)})


def sent(body: object) -> object:
    return json.loads(json.dumps(body))


def test_a_work_is_the_same_work_there() -> None:
    chooser = random.Random(torch.initial_seed())
    for _ in range(50):
        sampling = Sampling(
            max_tokens=chooser.randrange(99),
            temperature=chooser.random() * 2,
            top_p=chooser.random(),
            top_k=chooser.randrange(50),
            min_p=chooser.random(),
            seed=chooser.choice([None, 0, 2**63 - 1]),
            presence_penalty=chooser.uniform(-2, 2),
            frequency_penalty=chooser.uniform(-2, 2),
            repetition_penalty=chooser.uniform(0.1, 2),
            logit_bias={chooser.randrange(9): chooser.uniform(-100, 100) for _ in range(3)},
            stop_token_ids=frozenset(chooser.sample(range(9), 3)),
            ignore_eos=chooser.random() < 0.5,
            logprobs=chooser.choice([None, 0, 5]),
        )
        tokens = tuple(chooser.choices(range(300), k=5))
        answered = chooser.choice([None, (), tokens])
        work = Work("w", tokens, sampling, "handle", chooser.choice([None, 0, 3]), "g", answered)
        assert work_of(sent(work_body(work)), "handle") == work


@pytest.mark.parametrize(
    "event",
    [
        Started(5),
        Token(TokenScore(0)),
        Token(TokenScore(7, -0.1234567890123456789, ((7, -0.1), (8, -2.0)))),
        PromptScored((TokenScore(1), TokenScore(2, -1.5, ((3, -0.5),)))),
        Finished("length"),
        Finished("length", cached_tokens=16),
        Finished("stop", 3, TokenScore(3, -0.25)),
    ],
    ids=lambda event: type(event).__name__,
)
def test_an_event_is_the_same_event_here(event: object) -> None:
    again = event_of(sent(event_body(event)))
    assert again == event
    assert getattr(again, "score", None) == getattr(event, "score", None)


def test_what_is_no_event_is_refused() -> None:
    with pytest.raises(ValueError, match="no event"):
        event_of(["paused"])


def test_mixtures_keep_their_keys_and_find_their_experts() -> None:
    experts = {name: random_adapter(SHAPES, 4, name) for name in "abc"}
    parts = [(name, one.content_hash, 1 / 3 + i) for i, (name, one) in enumerate(experts.items())]
    blends = [Blend.of(parts, method=method) for method in METHOD_OPTIONS]
    for blend in (*blends, Blend.of(parts, method="svd", rank=3), Blend.of(parts, grid=EXACT_GRID)):
        again = mixture_of(sent(mixture_body(blend)), experts)
        assert isinstance(again, Blend)
        assert (again.key, again.parts) == (blend.key, blend.parts)
    for method in TokenMethod:
        arrow = TokenMixture.of(method, experts.values(), top_k=2, temperature=0.5)
        again = mixture_of(sent(mixture_body(arrow)), experts)
        assert isinstance(again, TokenMixture)
        assert again.key == arrow.key
    assert mixture_of(sent(mixture_body(SparseChoice("moe"))), {}) == SparseChoice("moe")
    other = {**experts, "a": random_adapter(SHAPES, 4, "a")}
    with pytest.raises(BlendError, match="'a' is not in the pool"):
        mixture_of(sent(mixture_body(arrow)), other)


@pytest.mark.parametrize(
    "error",
    [
        EngineOverloaded(7, 3),
        EngineExhausted("no memory"),
        EngineClosed("draining"),
        GrammarError("too deep"),
        EngineError("a step failed"),
        BlendError("not there"),
        AdapterError("damaged"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_client_is_told_the_same_of_an_error_there(error: Exception) -> None:
    again = error_of(sent(error_body(error)))
    assert type(again) is type(error)
    assert describe(again) == describe(error)


def test_a_fault_there_gives_nothing_away() -> None:
    answer = describe(error_of(sent(error_body(KeyError("/secret/path")))))
    assert answer.status == 500
    assert "secret" not in answer.message


def test_an_outline_has_all_but_the_numbers() -> None:
    adapters = [random_adapter(SHAPES, rank, name) for rank, name in ((4, "a"), (7, "b"), (4, "c"))]
    body = sent(outlines(adapters))
    assert len(body["modules"]) == len({stack.modules for one in adapters for stack in one.stacks})
    for adapter, again in zip(adapters, outlined(body), strict=True):
        for field in ("id", "content_hash", "max_rank", "nbytes", "ranks", "dtype"):
            assert getattr(again, field) == getattr(adapter, field)
        assert set(again.pairs) == set(adapter.pairs)
        assert again.stacks[0].a.is_meta
    card = SparseCard("m", Kind.MOLA, "sha256:x", 4, 2, 1000, {"experts": 3})
    assert card_of(sent(card_body(card))) == card


def test_messages_arrive_whole_and_what_is_none_is_refused() -> None:
    ours, theirs = socket.socketpair()
    message = {"do": "run", "text": "é" * 10**6}
    with ours, theirs:
        sender = threading.Thread(target=ours.sendall, args=(frames.encode(message) * 2,))
        sender.start()
        assert [frames.receive_now(theirs) for _ in range(2)] == [message] * 2
        sender.join()
        for wrong, problem in ((b"\x00\x00\x00\x02{]", "not JSON"), (b"\x00\x00\x00\x011", "not a mapping")):
            ours.sendall(wrong)
            with pytest.raises(frames.FrameError, match=problem):
                frames.receive_now(theirs)
        ours.sendall(b"\xff\xff\xff\xff")
        with pytest.raises(frames.FrameError, match="over the limit"):
            frames.receive_now(theirs)
        ours.sendall(b"\x00\x00")
        ours.shutdown(socket.SHUT_WR)
        with pytest.raises(EOFError):
            frames.receive_now(theirs)
