"""Which texts an encoder can read, by the bytes that its tokenizer gets into a token."""

import json
from pathlib import Path

import pytest

from loramux.router.encoder import Encoder, own_prefix
from loramux.router.encoder_files import read_tokenizer
from loramux.router.encoder_place import EncoderPlace
from loramux.router.errors import RouterFileError
from loramux.router.reading import READING_FILE, Reading
from tests.unit.router.kit import topic_pairs, write_json, write_static_encoder

FOREIGN = [
    "你好，请问今天天气怎么样？",
    "Привет, как дела?",
    "مرحبا كيف حالك",
    "4f6e6520737465702061",
    "xq zvkj wqx",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pairs, _ = topic_pairs(300, seed=2)
    texts = [text for text, _ in pairs]
    place = write_static_encoder(tmp_path / "encoder", texts)
    monkeypatch.setattr("loramux.router.reading._LEAST_VOCABULARY", 100)
    reading = Reading.fit(read_tokenizer(place / "tokenizer.json"), texts)
    assert reading is not None
    reading.save(place)
    return place


def test_a_small_vocabulary_says_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert Reading.fit(read_tokenizer(folder / "tokenizer.json"), ["some text"]) is None


def test_foreign_scripts_and_gibberish_are_not_read_and_own_texts_are(folder: Path) -> None:
    encoder = Encoder.load(folder)
    pairs, _ = topic_pairs(200, seed=3)
    assert encoder.encode([text for text, _ in pairs]).vectors.any(axis=1).all()
    assert not encoder.encode(FOREIGN).vectors.any()
    assert not encoder.encode([text * 500 for text in FOREIGN]).vectors.any()


def test_an_encoder_without_the_file_lets_all_pass_but_blank_texts(folder: Path) -> None:
    (folder / READING_FILE).unlink()
    encoder = Encoder.load(folder)
    assert encoder.encode(FOREIGN).vectors.any(axis=1).all()
    assert not encoder.encode(["", " \n", "\u200b", "\u0000\u0001", "?!", "🙂"]).vectors.any()


def test_the_file_belongs_to_the_encoders_identity(folder: Path) -> None:
    before = Encoder.load(folder).spec.id
    write_json(folder / READING_FILE, {"least_bytes_per_token": 1.0})
    assert Encoder.load(folder).spec.id != before


@pytest.mark.parametrize(
    "content", [{}, {"least_bytes_per_token": 0}, {"least_bytes_per_token": True}, {"least": 2}, [1]]
)
def test_a_wrong_file_is_refused(folder: Path, content: object) -> None:
    (folder / READING_FILE).write_text(json.dumps(content))
    with pytest.raises(RouterFileError, match="least_bytes_per_token"):
        Encoder.load(folder)


def test_the_prefix_is_the_models_own(tmp_path: Path) -> None:
    plain, e5 = tmp_path / "all-MiniLM-L6-v2", tmp_path / "multilingual-e5-small"
    for place in (plain, e5):
        place.mkdir()
    assert (
        own_prefix(EncoderPlace(plain)) == "query: "
    )  # no word of a sentence-transformers model: taken for an E5
    for place in (plain, e5):
        write_json(place / "config_sentence_transformers.json", {"__version__": {}})
    assert (own_prefix(EncoderPlace(plain)), own_prefix(EncoderPlace(e5))) == ("", "query: ")
    assert own_prefix(EncoderPlace(tmp_path, "intfloat/e5-base-v2")) == "query: "
    write_json(plain / "config_sentence_transformers.json", {"prompts": {"query": "Represent: "}})
    assert own_prefix(EncoderPlace(plain)) == "Represent: "
