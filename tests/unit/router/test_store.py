"""Router directories: what is written comes back, and every kind of tampering is one named line."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loramux.router.decision import STRATEGIES, RoutingOptions
from loramux.router.encoder import Encoder
from loramux.router.errors import RouterFileError, RoutingOptionsError
from loramux.router.fit.router import RouterFitOptions, fit_router
from loramux.router.state import RouterState
from loramux.router.store import load_router, load_state, save_router
from tests.unit.router.bert import write_classifier
from tests.unit.router.kit import TOPICS, edit_json, topic_pairs, write_static_encoder

EXPERTS = list(TOPICS)


def fitted(encoder: Encoder, **options: Any) -> RouterState:
    pairs, labels = topic_pairs(160, seed=7)
    vectors = encoder.encode([text for text, _ in pairs]).vectors
    return fit_router(vectors, labels, EXPERTS, encoder.spec, RouterFitOptions(samples=8, **options))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pairs, _ = topic_pairs(160, seed=7)
    place = tmp_path_factory.mktemp("original") / "router"
    write_static_encoder(place / "encoder", [text for text, _ in pairs])
    save_router(fitted(Encoder.load(place / "encoder")), place)
    return place


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "router"))


def test_what_is_saved_comes_back(folder: Path) -> None:
    encoder = Encoder.load(folder / "encoder")
    state, again = fitted(encoder), load_state(folder)
    assert again.experts == state.experts
    assert again.encoder == state.encoder == encoder.spec
    assert dict(again.calibration) == dict(state.calibration)
    assert (again.hybrid_weight, again.centring) == (state.hybrid_weight, state.centring)
    np.testing.assert_array_equal(again.centroids, state.centroids)
    np.testing.assert_array_equal(again.corpus_mean, state.corpus_mean)
    assert again.classifier is not None
    assert state.classifier is not None
    np.testing.assert_array_equal(again.classifier.weight, state.classifier.weight)
    np.testing.assert_array_equal(again.classifier.bias, state.classifier.bias)
    assert again.samples is not None
    assert state.samples is not None
    np.testing.assert_array_equal(again.samples.labels, state.samples.labels)
    np.testing.assert_allclose(again.samples.vectors, state.samples.vectors, atol=1e-3)
    assert again.familiarity is not None
    assert state.familiarity is not None
    np.testing.assert_array_equal(again.familiarity.means, state.familiarity.means)
    np.testing.assert_array_equal(again.familiarity.precision, state.familiarity.precision)
    assert again.familiarity.center == state.familiarity.center
    assert again.familiarity.scale == state.familiarity.scale


def test_a_router_of_version_1_has_no_familiarity(folder: Path) -> None:
    def older(content: dict[str, Any]) -> None:
        content["version"] = 1
        del content["familiarity"]

    edit_json(folder / "router.json", older)
    assert load_state(folder).familiarity is None


def test_a_loaded_router_decides_as_the_fitted_one(folder: Path) -> None:
    router = load_router(folder, experts=EXPERTS[::-1], defaults=RoutingOptions(strategy="similarity"))
    for topic, words in TOPICS.items():
        for strategy in STRATEGIES:
            [decision] = router.decide(
                [" ".join(words[:5])], RoutingOptions(strategy=strategy, threshold=-1.0)
            )
            assert decision.candidates[0].id == topic


def test_no_scratch_files_are_left(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["encoder", "router.json", "router.safetensors"]


def drop(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda content: {name: value for name, value in content.items() if name != key}


JSON_DAMAGE: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("format", lambda c: c.update(format="other"), "format"),
    ("scale", lambda c: c["familiarity"].update(scale=0), "familiarity.scale"),
    ("version", lambda c: c.update(version=4), "version"),
    ("extra", lambda c: c.update(colour="red"), "unknown keys ['colour']"),
    ("missing", drop("centring"), "missing keys ['centring']"),
    ("list", lambda c: [c], "expected an object"),
    ("no experts", lambda c: c.update(experts=[]), "experts"),
    ("twice", lambda c: c.update(experts=["garden"] * 4), "experts"),
    ("other ids", lambda c: c["experts"].__setitem__(0, "cellar"), "missing ['kitchen'], unknown ['cellar']"),
    ("fewer", lambda c: c.update(experts=c["experts"][1:]), "centroids"),
    ("id", lambda c: c["encoder"].update(id="sha256:0000000000000000"), "encoder.id"),
    ("pooling", lambda c: c["encoder"].update(pooling="cls"), "encoder.pooling"),
    ("normalize", lambda c: c["encoder"].update(normalize=False), "encoder.normalize"),
    ("dimension", lambda c: c["encoder"].update(dimension=23), "centroids"),
    ("dimension type", lambda c: c["encoder"].update(dimension=True), "encoder.dimension"),
    ("max tokens", lambda c: c["encoder"].update(max_tokens=0), "encoder.max_tokens"),
    ("path", lambda c: c["encoder"].update(path="../elsewhere"), "encoder.path"),
    ("absolute", lambda c: c["encoder"].update(path="/etc"), "encoder.path"),
    ("no such path", lambda c: c["encoder"].update(path="gone"), "directory is missing"),
    ("kind", lambda c: c["classifier"].update(kind="forest"), "classifier.kind"),
    ("classifier path", lambda c: c["classifier"].update(kind="transformer", path="../x"), "classifier.path"),
    ("temperature", lambda c: c["calibration"]["hybrid"].update(temperature=0), "hybrid.temperature"),
    ("nan", lambda c: c["calibration"]["hybrid"].update(threshold=float("nan")), "hybrid.threshold"),
    ("strategy", lambda c: c["calibration"].update(similarity=3), "calibration.similarity"),
    ("weight", lambda c: c.update(hybrid_weight=2), "hybrid_weight"),
    ("centring", lambda c: c.update(centring="yes"), "centring"),
]


@pytest.mark.parametrize(
    ("change", "match"), [row[1:] for row in JSON_DAMAGE], ids=[row[0] for row in JSON_DAMAGE]
)
def test_a_changed_router_json_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], Any], match: str
) -> None:
    edit_json(folder / "router.json", change)
    with pytest.raises(RouterFileError) as caught:
        load_router(folder, experts=EXPERTS)
    assert match in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


TENSOR_DAMAGE: list[tuple[str, Callable[[dict[str, np.ndarray]], Any], str]] = [
    ("nan", lambda t: t["centroids"].__setitem__((1, 2), np.nan), "centroids"),
    ("length", lambda t: t["centroids"][1].__imul__(1.5), "harbour"),
    ("rows", lambda t: t.update(centroids=t["centroids"][:3].copy()), "centroids"),
    ("integers", lambda t: t.update(centroids=t["centroids"].astype(np.int32)), "centroids"),
    ("no mean", lambda t: t.pop("corpus_mean"), "corpus_mean: tensor is missing"),
    ("bias", lambda t: t.update({"classifier.bias": t["classifier.bias"][:2].copy()}), "classifier.bias"),
    ("head", lambda t: t["classifier.weight"].__setitem__((0, 0), np.inf), "classifier.weight"),
    ("no head", lambda t: t.pop("classifier.weight"), "classifier.weight: tensor is missing"),
    ("labels", lambda t: t["samples.labels"].__setitem__(0, 9), "samples.labels"),
    ("no labels", lambda t: t.pop("samples.labels"), "samples.labels"),
    ("samples", lambda t: t.pop("samples.vectors"), "samples.vectors"),
]


@pytest.mark.parametrize(
    ("change", "match"), [row[1:] for row in TENSOR_DAMAGE], ids=[row[0] for row in TENSOR_DAMAGE]
)
def test_a_changed_tensor_is_refused(
    folder: Path, change: Callable[[dict[str, np.ndarray]], Any], match: str
) -> None:
    file = folder / "router.safetensors"
    tensors = {name: tensor.copy() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(RouterFileError) as caught:
        load_router(folder)
    assert match in str(caught.value)
    assert "router.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["router.json", "router.safetensors"])
def test_missing_and_cut_files_are_named(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(RouterFileError, match=name):
        load_router(folder)
    (folder / name).unlink()
    with pytest.raises(RouterFileError, match=f"{name}: file is missing"):
        load_router(folder)


def test_a_changed_encoder_stops_the_start(folder: Path) -> None:
    weights = folder / "encoder" / "model.safetensors"
    table = load_file(weights)["embedding.weight"].copy()
    table[5, 5] += 0.25
    save_file({"embedding.weight": table}, weights)
    with pytest.raises(
        RouterFileError, match=r"encoder\.id: the centroids were made with .* fit the router again"
    ):
        load_router(folder)


def test_another_encoder_is_one_option_and_must_be_the_same_model(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    (folder / "encoder").rename(moved)
    with pytest.raises(RouterFileError, match="directory is missing"):
        load_router(folder)
    assert (
        load_router(folder, encoder=moved).decide(["anchor mast sailor tide rudder keel"])[0].candidates[0].id
        == "harbour"
    )
    other = write_static_encoder(tmp_path / "other", ["entirely different"], dimension=32)
    with pytest.raises(RouterFileError, match="the centroids were made with"):
        load_router(folder, encoder=other)


def test_a_hub_encoder_is_kept_by_id_alone(folder: Path) -> None:
    state = load_state(folder)
    save_router(state, folder, encoder_path=None)
    # The id is a fingerprint here, so there is nothing in the cache to find.
    with pytest.raises(RouterFileError, match="encoder not found"):
        load_router(folder)
    assert load_router(folder, encoder=folder / "encoder").experts == tuple(EXPERTS)


def test_a_transformer_classifier_replaces_the_linear_head(folder: Path) -> None:
    labels = dict(enumerate(EXPERTS))
    write_classifier(folder / "classifier", labels)
    save_router(load_state(folder), folder, transformer_classifier="classifier")
    router = load_router(folder)
    assert router.classifier is not None
    assert router.classifier.kind == "transformer"
    [decision] = router.decide(["mulch the orchard"])
    known = router.state.familiarity
    assert known is not None
    share = float(known.probability(router.embed(["mulch the orchard"]).vectors)[0])
    assert sum(c.probability or 0 for c in decision.candidates) == pytest.approx(share)
    [cheap] = router.decide(["mulch the orchard"], RoutingOptions(strategy="similarity"))
    assert all(candidate.probability is None for candidate in cheap.candidates)
    edit_json(folder / "router.json", lambda c: c["experts"].__setitem__(0, "cellar"))
    with pytest.raises(RouterFileError, match="id2label"):
        load_router(folder)


def test_defaults_that_the_router_cannot_serve_are_an_options_error(folder: Path) -> None:
    edit_json(folder / "router.json", lambda content: content.update(classifier=None))
    with pytest.raises(RoutingOptionsError, match="hybrid needs a classifier"):
        load_router(folder)
    assert load_router(folder, defaults=RoutingOptions(strategy="similarity")).classifier is None
