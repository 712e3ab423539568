"""Which encoder directories are refused before anything in them is loaded, and how hub ids are found."""

from pathlib import Path

import pytest

from loramux.router.encoder import Encoder
from loramux.router.encoder_files import fingerprint, inspect_encoder
from loramux.router.encoder_place import EncoderPlace
from loramux.router.errors import RouterFileError
from tests.unit.router.kit import edit_json, module, write_json, write_static_encoder

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_static_encoder(tmp_path / "encoder", ["anchor keel rudder", "soil and seedling"])


def cached(tmp_path: Path, name: str) -> Path:
    """A hub cache that holds one static encoder under `name`."""
    home = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    write_static_encoder(home / "snapshots" / REVISION, ["tide and mast"])
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(REVISION)
    return tmp_path / "hub"


def test_a_hub_id_is_found_in_the_cache_and_is_the_encoders_id(tmp_path: Path) -> None:
    hub = cached(tmp_path, "someone/small-embedder")
    encoder = Encoder.load("someone/small-embedder", cache_dir=hub)
    assert encoder.spec.id == "someone/small-embedder"
    assert encoder.encode(["tide"]).vectors.any()


@pytest.mark.parametrize("name", ["someone/absent", "nowhere", "./nowhere", "a/b/c", "/no/such"])
def test_what_is_neither_directory_nor_cached_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(RouterFileError, match="encoder not found") as caught:
        EncoderPlace.find(name, tmp_path)
    assert caught.value.file == name
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "kind",
    [
        "os.system",
        "modeling_custom.StaticEmbedding",
        "sentence_transformers.sentence_transformer.modules.dropout.Dropout",
        "sentence_transformersevil.StaticEmbedding",
    ],
)
def test_only_known_module_classes_are_loaded(folder: Path, kind: str) -> None:
    write_json(folder / "modules.json", [module(0, "", kind)])
    with pytest.raises(RouterFileError, match=r"modules\.json: \[0\]\.type"):
        inspect_encoder(folder)


def test_a_module_may_not_leave_the_directory(folder: Path, tmp_path: Path) -> None:
    write_static_encoder(tmp_path / "other", ["mulch"])
    edit_json(folder / "modules.json", lambda modules: modules[0].update(path="../other"))
    with pytest.raises(RouterFileError, match="leaves the encoder directory"):
        inspect_encoder(folder)


def test_pickled_weights_alone_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(RouterFileError, match="no safetensors weights"):
        inspect_encoder(folder)


def test_a_model_with_its_own_code_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model_type": "bert", "auto_map": {"AutoModel": "m.M"}})
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(RouterFileError, match="auto_map"):
        inspect_encoder(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", "not json", "\udcff", '[{"type": 3}]'])
def test_a_malformed_module_list_is_named(folder: Path, content: str) -> None:
    (folder / "modules.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(RouterFileError, match=r"modules\.json"):
        inspect_encoder(folder)


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode": "lasttoken"}, "lasttoken"),
        ({"pooling_mode": ["cls", "mean"]}, "cls+mean"),
    ],
)
def test_the_pooling_is_read_from_either_form(
    tmp_path: Path, pooling: dict[str, object], expected: str
) -> None:
    package = "sentence_transformers.models"
    modules = [module(0, "", f"{package}.Transformer"), module(1, "1_Pooling", f"{package}.Pooling")]
    write_json(tmp_path / "modules.json", modules)
    write_json(tmp_path / "config.json", {"model_type": "bert"})
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "1_Pooling").mkdir()
    write_json(tmp_path / "1_Pooling" / "config.json", pooling)
    files = inspect_encoder(tmp_path)
    assert files.pooling == expected
    write_json(tmp_path / "1_Pooling" / "config.json", {**pooling, "include_prompt": False})
    with pytest.raises(RouterFileError, match="include_prompt"):
        inspect_encoder(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_the_fingerprint_covers_weights_and_tokenizer(folder: Path, name: str) -> None:
    before = fingerprint(inspect_encoder(folder))
    (folder / "README.md").write_text("words")
    assert fingerprint(inspect_encoder(folder)) == before
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    assert fingerprint(inspect_encoder(folder)) != before
