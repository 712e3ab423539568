"""Blends: one value for one mixture, whatever way it was asked for."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux.adapters.blend import EXACT_GRID, METHOD_OPTIONS, Blend, BlendPart, resolve_method
from loramux.adapters.errors import BlendError

GRIDS = st.sampled_from([0.01, 0.05, 0.1, 0.001, 1.0, 0.3])
WEIGHTS = st.floats(-8, 8)
PARTS = st.dictionaries(st.sampled_from("abcdefgh"), WEIGHTS, max_size=6).map(
    lambda weights: [(name, f"hash-{name}", weight) for name, weight in weights.items()]
)


@given(PARTS, GRIDS, st.randoms(use_true_random=False))
def test_order_does_not_matter(parts: list[tuple[str, str, float]], grid: float, random: object) -> None:
    shuffled = list(parts)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    first, second = Blend.of(parts, grid=grid), Blend.of(shuffled, grid=grid)
    assert first == second
    assert hash(first) == hash(second)
    assert first.parts == second.parts


@given(PARTS, GRIDS)
def test_rounding_is_to_the_nearest_step_and_settles(
    parts: list[tuple[str, str, float]], grid: float
) -> None:
    blend = Blend.of(parts, grid=grid)
    given_weights = {content_hash: weight for _, content_hash, weight in parts}
    for part in blend.parts:
        assert abs(part.weight - given_weights[part.content_hash]) <= grid / 2 * (1 + 1e-9)
        assert part.weight != 0
        assert math.isclose(part.weight / grid, round(part.weight / grid), rel_tol=1e-9)
    again = Blend.of(blend.parts, grid=grid)
    assert again == blend
    assert again.parts == blend.parts


@given(PARTS, GRIDS)
def test_the_strongest_expert_survives_unless_all_vanish(
    parts: list[tuple[str, str, float]], grid: float
) -> None:
    blend = Blend.of(parts, grid=grid)
    if blend.parts:
        assert not blend.vanished
        top = max(abs(weight) for _, _, weight in parts)
        survivors = [abs(part.weight) for part in blend.parts if _among_top(part, parts, top)]
        assert survivors
        assert max(survivors) == max(abs(part.weight) for part in blend.parts)
    else:
        assert blend.is_bare
        assert blend.vanished == any(weight != 0 for _, _, weight in parts)


def _among_top(part: BlendPart, parts: list[tuple[str, str, float]], top: float) -> bool:
    return any(content == part.content_hash and abs(weight) == top for _, content, weight in parts)


@given(PARTS, PARTS, GRIDS)
def test_equal_keys_mean_equal_mixtures(
    one: list[tuple[str, str, float]], other: list[tuple[str, str, float]], grid: float
) -> None:
    first, second = Blend.of(one, grid=grid), Blend.of(other, grid=grid)
    same = [part[1:] for part in first.parts] == [part[1:] for part in second.parts]
    assert (first.key == second.key) == same
    assert (first == second) == same


def test_near_weights_share_a_blend_and_a_coarser_grid_is_another_one() -> None:
    near = [Blend.of([("a", "h1", weight), ("b", "h2", 0.3)]) for weight in (0.704, 0.6951)]
    assert near[0] == near[1]
    assert near[0].parts[0].weight == 0.7
    assert near[0] != Blend.of([("a", "h1", 0.7), ("b", "h2", 0.3)], grid=0.1)


def test_names_are_not_part_of_the_identity_but_contents_are() -> None:
    assert Blend.of([("a", "h1", 1.0)]) == Blend.of([("renamed", "h1", 1.0)])
    assert Blend.of([("a", "h1", 1.0)]) != Blend.of([("a", "h2", 1.0)])
    assert Blend.of([("a", "h1", 0.5), ("b", "h2", 0.2)]) != Blend.of([("a", "h1", 0.2), ("b", "h2", 0.5)])


def test_the_key_is_stable() -> None:
    """A change of the key format empties every cache; make it on purpose."""
    blend = Blend.of([("a", "h1", 0.7), ("b", "h2", -0.3)], method="svd", rank=8)
    assert blend.key == "3cf2661251daa9d11a6758587ced710a"
    assert len(blend.key) == 32


def test_the_same_content_twice_counts_with_the_sum() -> None:
    blend = Blend.of([("b", "h", 0.004), ("a", "h", 0.004), ("c", "i", 0.5)])
    assert blend.parts == (BlendPart("a", "h", 0.01), BlendPart("c", "i", 0.5))
    assert Blend.of([("a", "h", 0.5), ("a", "h", -0.5)]).is_bare
    assert not Blend.of([("a", "h", 0.5), ("a", "h", -0.5)]).vanished


def test_bare_blends_are_one_blend() -> None:
    vanished = Blend.of([("a", "h", 0.004)], method="ties", density=0.3)
    assert vanished.is_bare
    assert vanished.vanished
    assert vanished == Blend.bare() == Blend.of([]) == Blend.of([("a", "h", 0.0)], grid=0.5)
    assert not Blend.of([("a", "h", 0.0)]).vanished


def test_options_that_cannot_matter_are_dropped() -> None:
    two = [("a", "h1", 0.5), ("b", "h2", 0.5)]
    assert Blend.of(two, rank=4, density=0.1, seed=9) == Blend.of(two)
    assert Blend.of(two, method="svd", rank=4, seed=1) == Blend.of(two, method="svd", rank=4, density=0.2)
    assert Blend.of(two, method="svd", rank=4) != Blend.of(two, method="svd", rank=5)
    assert Blend.of(two, method="ties", density=0.5, seed=3) == Blend.of(two, method="ties")
    assert Blend.of(two, method="ties", density=0.4) != Blend.of(two, method="ties")
    assert Blend.of(two, method="dare_ties", seed=1) != Blend.of(two, method="dare_ties", seed=2)
    assert len({Blend.of(two, method=method) for method in METHOD_OPTIONS}) == len(METHOD_OPTIONS)


@pytest.mark.parametrize("method", METHOD_OPTIONS)
def test_one_expert_needs_no_method(method: str) -> None:
    assert Blend.of([("a", "h", 0.5)], method=method) == Blend.of([("a", "h", 0.5)])
    assert resolve_method("svd", 1, rank=3).method == "svd"


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf, 65.0, -1e300])
def test_weights_out_of_range_are_refused_by_expert(weight: float) -> None:
    with pytest.raises(BlendError, match="expert 'b'"):
        Blend.of([("a", "h1", 0.5), ("b", "h2", weight)])


def test_the_limit_holds_for_sums_and_can_be_set() -> None:
    with pytest.raises(BlendError, match=r"expert 'a'.*±64"):
        Blend.of([("a", "h", 40.0), ("a", "h", 40.0)])
    with pytest.raises(BlendError, match="±2"):
        Blend.of([("a", "h", 2.5)], max_weight=2.0)
    assert Blend.of([("a", "h", -64.0)]).parts[0].weight == -64.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "average"}, "unknown merge method 'average'; known: exact, svd"),
        ({"method": "svd", "rank": 0}, "rank"),
        ({"method": "svd", "rank": 2.5}, "rank"),
        ({"method": "svd", "rank": True}, "rank"),
        ({"method": "ties", "density": 0.0}, "density"),
        ({"method": "ties", "density": 1.01}, "density"),
        ({"method": "ties", "density": math.nan}, "density"),
        ({"method": "dare_ties", "seed": -1}, "seed"),
        ({"method": "dare_ties", "seed": 2**63}, "seed"),
        ({"density": 7.0}, "density"),
        ({"grid": 0.0}, "grid"),
        ({"grid": math.nan}, "grid"),
        ({"grid": 2.0}, "grid"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(BlendError, match=message):
        Blend.of([("a", "h1", 0.5), ("b", "h2", 0.5)], **options)  # type: ignore[arg-type]


def test_ambiguous_parts_are_refused() -> None:
    with pytest.raises(BlendError, match="'a' comes with two different contents"):
        Blend.of([("a", "h1", 0.5), ("a", "h2", 0.5)])
    for part in (("", "h", 0.5), ("a", "", 0.5)):
        with pytest.raises(BlendError, match="needs an expert id and a content hash"):
            Blend.of([part])


def test_blends_compare_only_with_blends() -> None:
    assert Blend.bare() != Blend.bare().key


@pytest.mark.parametrize("weight", [1 / 3, 0.005, 1e-7, 1e-9, -1e-10, 1e-37, 64.0, -63.999999])
def test_a_mixture_as_it_was_written_loses_less_than_float32_would(weight: float) -> None:
    blend = Blend.of([("a", "hash a", weight), ("b", "hash b", 0.5)], grid=EXACT_GRID)
    kept = {part.expert_id: part.weight for part in blend.parts}
    assert kept["a"] == pytest.approx(weight, rel=2**-24, abs=0)
    again = Blend.of(blend.parts, grid=EXACT_GRID)
    assert again.key == blend.key
    other = Blend.of([("a", "hash a", weight * (1 - 1e-6)), ("b", "hash b", 0.5)], grid=EXACT_GRID)
    assert other.key != blend.key


def test_a_weight_below_float32_vanishes_and_says_so() -> None:
    assert Blend.of([("a", "hash a", 1e-46)], grid=EXACT_GRID).vanished
