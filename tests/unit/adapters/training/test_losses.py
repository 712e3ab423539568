"""Router losses at balance and at collapse, against sums written out, and where their gradients go."""

import math

import pytest
import torch

from loramux.adapters.training.losses import (
    RouterLog,
    mass_variation,
    real_tokens,
    switch_balance,
    top_k_balance,
    z_loss,
)

EXPERTS = 8


def balanced(tokens=EXPERTS * 4, top_k=2, size=1e-4):
    """Every expert chosen equally often in every place, with probabilities all but equal."""
    logits = torch.zeros(tokens, EXPERTS)
    for token in range(tokens):
        for place in range(top_k):
            logits[token, (token + place) % EXPERTS] = size * (top_k - place)
    return logits


def collapsed(tokens=32, top_k=2):
    logits = torch.zeros(tokens, EXPERTS)
    for place in range(top_k):
        logits[:, place] = 60.0 - 30.0 * place
    return logits


def test_balanced_routing_costs_top_k_and_collapsed_routing_the_number_of_experts():
    assert top_k_balance(balanced(), 2) == pytest.approx(2.0, abs=1e-3)
    assert top_k_balance(collapsed(), 2) == pytest.approx(8.0, abs=1e-3)
    assert switch_balance(balanced(top_k=1)) == pytest.approx(1.0, abs=1e-3)
    assert switch_balance(collapsed(top_k=1)) == pytest.approx(8.0, abs=1e-3)


def test_the_balance_loss_is_the_sum_written_out():
    logits = torch.randn(23, 5, dtype=torch.float64)
    p = logits.softmax(-1)
    order = p.argsort(-1, descending=True)
    expected = 0.0
    for place in range(3):
        for expert in range(5):
            share = float((order[:, place] == expert).double().mean())
            expected += 5 * share * float(p[:, expert].mean())
    assert float(top_k_balance(logits, 3)) == pytest.approx(expected, rel=1e-6)
    first = [float((order[:, 0] == e).double().mean()) * float(p[:, e].mean()) for e in range(5)]
    assert float(switch_balance(logits)) == pytest.approx(5**2 * sum(first) / 5, rel=1e-6)


def test_a_step_down_the_balance_loss_evens_out_the_choices():
    logits = torch.randn(64, EXPERTS) * 0.1
    logits[:, 3] += 0.5
    bias = torch.zeros(EXPERTS, requires_grad=True)
    before = top_k_balance(logits, 2)
    optimiser = torch.optim.SGD([bias], lr=0.5)
    for _ in range(50):
        optimiser.zero_grad()
        top_k_balance(logits + bias, 2).backward()
        optimiser.step()
    assert bias[3] == bias.min()
    assert top_k_balance(logits + bias, 2) < before - 0.2


def test_the_z_loss_is_the_mean_square_of_the_log_of_the_sum():
    logits = torch.randn(17, 4, dtype=torch.float64)
    expected = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits.tolist()) / 17
    assert float(z_loss(logits)) == pytest.approx(expected)


def test_padding_counts_for_nothing():
    one, two = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    flat = real_tokens([one, two], mask)
    assert torch.equal(flat, torch.cat([one[0], one[1, :2], two[0], two[1, :2]]))
    noisy = one.clone()
    noisy[1, 2:] = 1e3
    assert mass_variation([noisy], mask) == mass_variation([one], mask)


def test_the_variation_of_masses_is_zero_for_equal_masses_and_the_number_of_experts_for_one():
    mask = torch.ones(3, 4, dtype=torch.bool)
    assert mass_variation([torch.zeros(3, 4, 6)], mask) == pytest.approx(0.0)
    alone = torch.zeros(3, 4, 6)
    alone[..., 2] = 80.0
    assert mass_variation([alone], mask) == pytest.approx(6.0, rel=1e-4)
    assert mass_variation([alone, torch.zeros(3, 4, 6)], mask) == pytest.approx(3.0, rel=1e-4)
    logits = torch.randn(3, 4, 6)
    mass = logits.softmax(-1).sum((0, 1)).double()
    expected = float(((mass - mass.mean()) ** 2).sum() / 5 / mass.mean() ** 2)
    assert float(mass_variation([logits], mask)) == pytest.approx(expected, rel=1e-4)


def test_a_log_is_empty_once_it_was_taken():
    log = RouterLog()
    log.add(torch.zeros(1, 1, 2))
    assert len(log.take()) == 1
    assert log.take() == []
