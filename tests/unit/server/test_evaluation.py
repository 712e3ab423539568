"""The two tables of an evaluation against direct computation."""

import pytest
import torch

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.blend import Blend
from loramux.adapters.training.chat import EncodedRow
from loramux.router.decision import Candidate, Decision
from loramux.server.evaluation.losses import Losses
from loramux.server.evaluation.routing import NO_EXPERT, routing_table
from tests.tiny import random_adapter, random_prompt, tiny_llama, with_delta


def decision(expert: str | None) -> Decision:
    chosen = () if expert is None else (Candidate(expert, 1.0, 0.5, 0.5, 0.5),)
    return Decision("hybrid", "softmax", 1.0, 0.0, chosen, chosen, expert is None, "", False, 0.5, 0.0)


def test_first_choices_are_counted_by_the_domain_of_the_expert() -> None:
    decisions = {
        "sql": [decision("e1"), decision("e2"), decision("e3"), decision(None)],
        "law": [decision("e3"), decision("e3")],
    }
    table = routing_table("hybrid", decisions, {"e1": "sql", "e2": "sql", "e3": "law"})
    assert table.counts["sql"] == {"sql": 2, "law": 1, NO_EXPERT: 1}
    assert table.accuracy("sql") == 0.5
    assert table.accuracy("law") == 1.0
    assert table.accuracy() == pytest.approx(4 / 6)


def test_losses_equal_those_of_models_with_the_deltas_in_their_weights() -> None:
    model = tiny_llama()
    experts = {
        name: random_adapter(BaseShapes.from_model(model, "tiny"), rank, name)
        for name, rank in {"a": 4, "b": 7}.items()
    }
    rows = [EncodedRow(random_prompt(n), start) for n, start in [(9, 4), (30, 11), (17, 16), (30, 2)]]
    mixtures = [{"a": 1.0}, {"a": 0.5, "b": 0.5}, {}, {"b": -0.75, "a": 0.25}]
    blends = [Blend.of([(n, experts[n].content_hash, w) for n, w in mixture.items()]) for mixture in mixtures]

    def direct(mixture: dict[str, float], row: EncodedRow) -> float:
        changed = with_delta(model, [(experts[n], w) for n, w in mixture.items()])
        logprobs = changed(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        return -sum(float(logprobs[i - 1, row.ids[i]]) for i in range(row.answer_start, len(row.ids)))

    tokens = sum(len(row) - row.answer_start for row in rows)
    expected_blend = sum(direct(m, row) for m, row in zip(mixtures, rows, strict=True)) / tokens
    singles = {name: sum(direct({name: 1.0}, row) for row in rows) / tokens for name in experts}
    expected_base = sum(direct({}, row) for row in rows) / tokens

    loss = Losses(model, experts, pad_id=0).domain(rows, blends)

    assert (loss.rows, loss.tokens) == (4, tokens)
    assert loss.base == pytest.approx(expected_base, rel=1e-5)
    assert loss.blend == pytest.approx(expected_blend, rel=1e-5)
    assert loss.best_expert == min(singles, key=singles.__getitem__)
    assert loss.best == pytest.approx(min(singles.values()), rel=1e-5)
