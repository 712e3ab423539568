"""An expert that joins a fitted router in closed form, and leaves it again."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from loramux.router.classifier import LinearClassifier
from loramux.router.decision import STRATEGIES, Decision, RoutingOptions
from loramux.router.encoder import Encoder
from loramux.router.errors import RouterError, RoutingExamplesError
from loramux.router.fit.discriminant import Discriminant, joined_head
from loramux.router.fit.router import fit_router, join_expert
from loramux.router.joining import joined, left
from loramux.router.router import Router
from loramux.router.service import RoutingService
from loramux.router.state import RouterState
from tests.kit import DEMO_POOL
from tests.unit.router.kit import TOPICS, topic_pairs, write_static_encoder
from tests.unit.router.test_service import Gate
from tests.unit.router.test_service import parts as service_parts

KNOWN, NEW = list(TOPICS)[:3], "orchestra"


def texts_of(topic: str, seed: int, count: int = 400) -> list[str]:
    pairs, labels = topic_pairs(count, seed)
    return [text for (text, _), label in zip(pairs, labels, strict=True) if list(TOPICS)[label] == topic]


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Router:
    """Fitted on three topics of the four."""
    pairs, labels = topic_pairs(400, seed=1)
    texts = [text for text, _ in pairs]
    folder = write_static_encoder(tmp_path_factory.mktemp("encoder") / "static", texts, dimension=48)
    encoder = Encoder.load(folder)
    keep = labels < 3
    vectors = encoder.encode(texts).vectors
    return Router(fit_router(vectors[keep], labels[keep], KNOWN, encoder.spec), encoder)


def discriminant(state: RouterState) -> Discriminant:
    assert state.familiarity is not None
    return Discriminant(state.familiarity.means, state.familiarity.precision)


def head(state: RouterState) -> LinearClassifier:
    assert state.classifier is not None
    return state.classifier


def same(one: RouterState, other: RouterState) -> bool:
    """Bit for bit."""
    assert one.samples is not None
    assert other.samples is not None
    pairs = [
        (one.centroids, other.centroids),
        (head(one).weight, head(other).weight),
        (head(one).bias, head(other).bias),
        (discriminant(one).means, discriminant(other).means),
        (discriminant(one).precision, discriminant(other).precision),
        (one.samples.vectors, other.samples.vectors),
        (one.samples.labels, other.samples.labels),
    ]
    return one.experts == other.experts and all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("count", [1, 5, 90])
def test_the_new_row_is_what_the_means_and_the_shared_precision_give(router: Router, count: int) -> None:
    """Against the head of all means together, at the temperature of the old one."""
    old = router.state
    vectors = router.encoder.encode(texts_of(NEW, seed=1)[:count]).vectors
    grown = join_expert(old, NEW, vectors)
    mean = vectors.astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(discriminant(grown).means[3], mean, atol=1e-7)
    np.testing.assert_allclose(grown.centroids[3], mean / np.linalg.norm(mean), atol=1e-7)
    whole = Discriminant(discriminant(grown).means, discriminant(old).precision).head()
    temperature = np.abs(whole.weight[:3]).max() / np.abs(head(old).weight).max()
    refitted = whole.cooled(float(temperature))
    np.testing.assert_allclose(head(grown).weight, refitted.weight, rtol=1e-6, atol=1e-6)
    # The mean of few rows is noisy; what that adds to its length on average is taken off again.
    refitted.bias[3] += 0.5 * 48 / count / temperature
    np.testing.assert_allclose(head(grown).bias, refitted.bias, rtol=1e-6, atol=1e-6)


def test_the_length_of_a_mean_is_not_overestimated_for_few_rows() -> None:
    """On average over samples the bias is that of the true mean, however few rows there are."""
    generator = np.random.default_rng(8)
    root = generator.normal(size=(6, 6)) * 0.3
    covariance = root @ root.T + 0.1 * np.eye(6)
    truth = Discriminant(
        generator.normal(size=(2, 6)).astype(np.float32), np.linalg.inv(covariance).astype("f")
    )
    for count in (1, 3):
        rows = generator.multivariate_normal(truth.means[1], covariance, size=(4000, count)).astype("f")
        found = [joined_head(truth.head(), truth, some).bias[2] for some in rows]
        error = float(np.std(found)) / 4000**0.5
        assert np.mean(found) == pytest.approx(truth.head().bias[1], abs=4 * error)


def test_who_joins_and_leaves_again_changes_nothing(router: Router) -> None:
    examples = texts_of(NEW, seed=1)[:6]
    grown = joined(router, "new", examples).router
    assert grown.experts == (*KNOWN, "new")
    assert same(left(grown, "new").state, router.state)
    again = joined(left(grown, "new"), "new", examples).router
    assert same(again.state, grown.state)
    twice = joined(grown, "newer", texts_of(NEW, seed=2)[:4]).router
    assert same(left(left(twice, "new"), "newer").state, router.state)


def share(decisions: list[Decision], expert: str) -> float:
    """Of the texts that go to the expert first."""
    return float(np.mean([not d.fallback and d.candidates[0].id == expert for d in decisions]))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_handful_of_texts_makes_an_expert_routable(router: Router, strategy: str) -> None:
    options = RoutingOptions(strategy=strategy)  # type: ignore[arg-type]
    grown = joined(router, "new", texts_of(NEW, seed=1)[:8]).router
    assert share(grown.decide(texts_of(NEW, seed=9), options), "new") > 0.7
    lost = 0.0
    for topic in KNOWN:
        fresh = texts_of(topic, seed=9)
        lost += share(router.decide(fresh, options), topic) - share(grown.decide(fresh, options), topic)
    assert lost / len(KNOWN) < 0.12


def test_routers_without_a_classifier_or_centring_take_experts_too(router: Router) -> None:
    assert router.state.centring
    for changes in ({"classifier": None, "familiarity": None, "samples": None}, {"centring": False}):
        state = replace(router.state, **changes)  # type: ignore[arg-type]
        bare = Router(state, router.encoder, defaults=RoutingOptions(strategy="similarity"))
        grown = joined(bare, "new", texts_of(NEW, seed=1)[:20]).router
        assert share(grown.decide(texts_of(NEW, seed=9)), "new") > 0.7
        assert left(grown, "new").experts == bare.experts


def test_texts_that_make_no_route_are_named(router: Router) -> None:
    for texts, number in ((["violin", "?!", "cello"], 1), (["\u200b"], 0)):
        with pytest.raises(RoutingExamplesError, match="blank") as caught:
            joined(router, "new", texts)
        assert caught.value.number == number
    vectors = router.encoder.encode(["violin"]).vectors
    with pytest.raises(RoutingExamplesError, match="cancel out"):
        join_expert(router.state, "new", np.concatenate([vectors, -vectors]))
    with pytest.raises(RouterError, match="already"):
        joined(router, KNOWN[0], ["violin"])
    with pytest.raises(RouterError, match="not in the router"):
        left(router, "new")


def test_cut_texts_are_counted(router: Router) -> None:
    assert joined(router, "new", ["violin cello", "violin " * 1000]).truncated == 1


def test_a_head_of_another_kind_is_refused(router: Router) -> None:
    """A logistic regression, a router of version 1, a fine-tuned model: none has a closed form."""
    state, text = router.state, ["violin"]
    other = LinearClassifier(head(state).weight + np.float32(0.5), head(state).bias)
    for changes in ({"classifier": other}, {"familiarity": None}):
        changed = Router(replace(state, **changes), router.encoder)  # type: ignore[arg-type]
        with pytest.raises(RoutingExamplesError, match="fitted again"):
            joined(changed, "new", text)
    tuned = Router(replace(state, classifier=None), router.encoder, head(state))
    with pytest.raises(RoutingExamplesError, match="fine-tuned"):
        joined(tuned, "new", text)
    with pytest.raises(RouterError, match="fine-tuned"):
        left(tuned, KNOWN[0])


def test_the_demo_pool_takes_experts() -> None:
    from loramux.router.store import load_router

    demo = load_router(DEMO_POOL / "router")
    grown = joined(demo, "new", ["Write a haiku about autumn rain", "Compose a short poem on the sea"])
    assert same(left(grown.router, "new").state, demo.state)


def test_a_text_on_its_way_is_decided_by_the_router_that_it_came_to() -> None:
    """The router is exchanged while one text is embedded, one waits, and one is asked again."""

    async def main() -> None:
        backend, router = service_parts()
        less = left(router, "e4")
        gate = Gate()
        backend.before = gate
        service = RoutingService(router)
        old = [asyncio.create_task(service.decide(text)) for text in ("first", "second")]
        await gate.reached()
        service.use(less)
        new = [asyncio.create_task(service.decide(text)) for text in ("first", "third")]
        await asyncio.sleep(0)
        gate.open.set()
        assert [len((await decision).candidates) for decision in old] == [5, 5]
        assert [len((await decision).candidates) for decision in new] == [4, 4]
        assert service.stats().cache_entries == 2
        assert len((await service.decide("second")).candidates) == 4
        service.use(router)
        assert service.stats().cache_entries == service.stats().cache_bytes == 0
        assert len((await service.decide("third")).candidates) == 5
        await service.close()
        with pytest.raises(RouterError, match="closed"):
            await service.left("e0")

    asyncio.run(main())


def test_the_service_makes_routers_beside_its_texts(router: Router) -> None:
    async def main() -> None:
        service = RoutingService(router)
        grown = await service.joined("new", texts_of(NEW, seed=1)[:6])
        assert service.experts == tuple(KNOWN)
        service.use(grown.router)
        assert (await service.decide("violin conductor tempo cello")).candidates[0].id == "new"
        service.use(await service.left("new"))
        assert same(service.router.state, router.state)
        await service.close()

    asyncio.run(main())
