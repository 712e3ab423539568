"""Where requests go: to their experts, not all to one place, and not elsewhere when others come or go."""

import random
from dataclasses import dataclass

import torch

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.blend import Blend
from loramux.server.leases import SparseChoice
from loramux.server.replicas.placement import Affinity, Shadow, Wish
from tests.tiny import random_adapter

SHAPES = BaseShapes("tiny", {"up": (24, 16)})


@dataclass(eq=False)
class Site:
    number: int
    shadow: Shadow
    load: int = 0


def sites(count: int, rows: int = 16) -> list[Site]:
    return [Site(number, Shadow(rows)) for number in range(count)]


def wish(*experts: str, key: str = "") -> Wish:
    return Wish(key or "+".join(experts), tuple((name, 4) for name in experts))


def test_a_wish_counts_rows_of_the_arena() -> None:
    experts = {name: random_adapter(SHAPES, rank, name) for name, rank in (("a", 4), ("b", 8))}
    parts = [(name, one.content_hash, 0.5) for name, one in experts.items()]
    exact = Blend.of(parts)
    assert set(Wish.of(exact, experts).parts) == {
        (one.content_hash, one.max_rank) for one in experts.values()
    }
    svd = Blend.of(parts, method="svd", rank=6)
    assert Wish.of(svd, experts).parts == ((svd.key, 6),)
    assert Wish.of(SparseChoice("moe"), experts) == Wish("moe")
    assert Wish.of(None, experts) == Wish()


def test_a_shadow_forgets_what_was_used_longest_ago() -> None:
    shadow = Shadow(12, [("old", 4)])
    shadow.leased(wish("a", "b"))
    assert shadow.missing(wish("old", "a", "b")) == 0
    shadow.leased(wish("old"))
    shadow.leased(wish("c"))
    assert shadow.missing(wish("a")) == 4
    assert shadow.missing(wish("old", "b", "c")) == 0


def test_a_request_goes_where_its_experts_are() -> None:
    places = sites(4)
    places[2].shadow.leased(wish("a", "b"))
    places[3].shadow.leased(wish("c"))
    order = Affinity().order(places, wish("a", "b", "c"))
    assert [one.number for one in order[:2]] == [2, 3]


def test_no_replica_gets_much_more_than_the_others() -> None:
    places, chooser = sites(3), random.Random(torch.initial_seed())
    for _ in range(300):
        asked = wish(chooser.choice("abcdefgh"), key="one and the same")
        chosen = Affinity().order(places, asked)[0]
        chosen.shadow.leased(asked)
        chosen.load += 1
        mean = sum(one.load for one in places) / 3
        assert max(one.load for one in places) <= max(1.5 * mean, mean + 4) + 1
    assert all(one.load for one in places)


def test_only_what_was_at_home_there_moves_when_one_goes() -> None:
    places = sites(5)
    wishes = [Wish(f"blend {number}") for number in range(300)]
    homes = {one.key: Affinity().order(places, one)[0] for one in wishes}
    counts = [sum(home is place for home in homes.values()) for place in places]
    assert min(counts) > 30
    left = [place for place in places if place is not places[1]]
    for one in wishes:
        home = Affinity().order(left, one)[0]
        assert home is homes[one.key] or homes[one.key] is places[1]
