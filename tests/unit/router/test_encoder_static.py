"""The lean path for static embeddings: the same vectors as sentence-transformers, and visible truncation."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loramux.router.encoder import E5_PREFIX, Encoder
from loramux.router.encoder_files import read_tokenizer
from loramux.router.errors import RouterError, RouterFileError
from tests.unit.router.kit import topic_pairs, write_static_encoder

TEXTS = [
    "how do I roast garlic in a skillet",
    "x",
    "Où est le phare? ¿Dónde está el muelle?",
    "锚在哪里 якорь 🚢",
    "ROAST   the\tonion\n\nplease",
    "\x00\x01 control \ufeff characters",
    "a" * 5000,
    "conductor " * 700,
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pairs, _ = topic_pairs(200, seed=1)
    return write_static_encoder(tmp_path / "encoder", [text for text, _ in pairs])


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float16, 2e-3)])
def test_equals_sentence_transformers(tmp_path: Path, dtype: type, tolerance: float) -> None:
    from sentence_transformers import SentenceTransformer

    folder = write_static_encoder(tmp_path / "encoder", TEXTS, dtype=dtype, seed=2)
    oracle = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    expected = oracle.encode([E5_PREFIX + text for text in TEXTS], show_progress_bar=False)
    got = Encoder.load(folder).encode(TEXTS).vectors
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected.astype(np.float32), atol=tolerance)


def test_the_layout_of_model2vec_equals_sentence_transformers(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    folder = write_static_encoder(tmp_path / "encoder", TEXTS, seed=3)
    generator = np.random.default_rng(4)
    table = load_file(folder / "model.safetensors")["embedding.weight"][:40]
    tokens = generator.integers(0, 40, 600)
    tensors = {
        "embeddings": table.copy(),
        "mapping": tokens,
        "weights": generator.random(600).astype(np.float32),
    }
    save_file(tensors, folder / "model.safetensors")
    oracle = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    expected = oracle.encode([E5_PREFIX + text for text in TEXTS], show_progress_bar=False)
    np.testing.assert_allclose(Encoder.load(folder).encode(TEXTS).vectors, expected, atol=1e-5)
    for name, bad in [("mapping", tokens + 1), ("weights", np.ones(3, np.float32))]:
        save_file({**tensors, name: bad}, folder / "model.safetensors")
        with pytest.raises(RouterFileError, match=name):
            Encoder.load(folder)


def test_equals_a_float64_mean_of_rows(folder: Path) -> None:
    from tokenizers import Tokenizer

    table = load_file(folder / "model.safetensors")["embedding.weight"].astype(np.float64)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text, vector in zip(TEXTS, Encoder.load(folder).encode(TEXTS).vectors, strict=True):
        mean = table[tokenizer.encode(E5_PREFIX + text).ids].mean(axis=0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-6)


def test_a_batch_gives_the_bits_of_single_calls(folder: Path) -> None:
    encoder = Encoder.load(folder)
    batch = encoder.encode(TEXTS)
    for row, text in enumerate(TEXTS):
        single = encoder.encode([text])
        assert np.array_equal(batch.vectors[row], single.vectors[0])
        assert batch.truncated[row] == single.truncated[0]


def test_the_limit_counts_the_prefix_and_is_exact(folder: Path) -> None:
    encoder = Encoder.load(folder, max_tokens=6, prefix="garlic ")
    texts = ["onion " * count for count in range(1, 10)]
    got = encoder.encode(texts)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    counts = [len(tokenizer.encode("garlic " + text).ids) for text in texts]
    assert got.truncated.tolist() == [count > 6 for count in counts]
    assert 6 in counts  # a text that just fits is among them, and is not marked
    same = [row for row, count in enumerate(counts) if count > 6]
    np.testing.assert_array_equal(got.vectors[same[0]], got.vectors[same[-1]])


def test_a_huge_text_is_cut_before_tokenizing_and_says_so(folder: Path) -> None:
    encoder = Encoder.load(folder, max_tokens=16)
    spaces = " " * (16 * 64)
    got = encoder.encode([spaces + "anchor", "anchor"])
    assert got.truncated.tolist() == [True, False]


def test_blank_texts_have_no_direction(folder: Path) -> None:
    got = Encoder.load(folder).encode(["", " \n\t", "tide"])
    assert not got.vectors[:2].any()
    assert np.linalg.norm(got.vectors[2]) == pytest.approx(1)
    assert not got.truncated.any()


def test_lone_surrogates_are_read_as_replacement_characters(folder: Path) -> None:
    got = Encoder.load(folder).encode(["dock \ud800", "dock ?"])
    np.testing.assert_array_equal(got.vectors[0], got.vectors[1])


def test_case_does_not_matter_but_the_prefix_does(folder: Path) -> None:
    encoder = Encoder.load(folder)
    upper, lower = encoder.encode(["SAIL the Vessel", "sail the vessel"]).vectors
    np.testing.assert_array_equal(upper, lower)
    bare = Encoder.load(folder, prefix="").encode(["sail the vessel"]).vectors[0]
    assert np.abs(bare - lower).max() > 1e-3


def test_no_texts_give_no_rows(folder: Path) -> None:
    got = Encoder.load(folder).encode([])
    assert got.vectors.shape == (0, 24)
    assert got.truncated.shape == (0,)


def test_one_string_is_not_a_sequence_of_texts(folder: Path) -> None:
    with pytest.raises(RouterError, match="sequence"):
        Encoder.load(folder).encode("tide")


def test_the_id_follows_the_content(folder: Path) -> None:
    first = Encoder.load(folder).spec
    assert first.id.startswith("sha256:")
    assert Encoder.load(folder).spec == first
    assert Encoder.load(folder, id="mine").spec.id == "mine"
    table = load_file(folder / "model.safetensors")["embedding.weight"]
    table[3, 3] += 1
    save_file({"embedding.weight": table}, folder / "model.safetensors")
    assert Encoder.load(folder).spec.id != first.id


def test_damaged_weights_are_refused_by_name(folder: Path) -> None:
    weights = folder / "model.safetensors"
    table = load_file(weights)["embedding.weight"]
    broken = table.copy()
    broken[7, 1] = np.nan
    for tensors, match in [
        ({"embedding.weight": broken}, "NaN"),
        ({"other": table}, "embedding.weight: missing"),
        ({"embedding.weight": table[:10].copy()}, "10 rows"),
    ]:
        save_file(tensors, weights)
        with pytest.raises(RouterFileError, match=match):
            Encoder.load(folder)
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(RouterFileError, match=r"model\.safetensors"):
        Encoder.load(folder)


def test_a_damaged_tokenizer_is_refused_by_name(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(RouterFileError, match=r"tokenizer\.json"):
        Encoder.load(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(RouterFileError, match=r"tokenizer\.json: file is missing"):
        Encoder.load(folder)


def test_a_few_texts_get_the_vectors_that_many_get(folder: Path) -> None:
    pairs, _ = topic_pairs(40, seed=3)
    texts = [*TEXTS, "", *(text for text, _ in pairs)]
    encoder = Encoder.load(folder)
    together = encoder.encode(texts)
    for start in range(0, len(texts), 5):
        few = encoder.encode(texts[start : start + 5])
        np.testing.assert_array_equal(few.vectors, together.vectors[start : start + 5])
        np.testing.assert_array_equal(few.truncated, together.truncated[start : start + 5])


def test_a_vector_is_the_mean_of_its_tokens_in_float64(folder: Path) -> None:
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    table = load_file(folder / "model.safetensors")["embedding.weight"].astype(np.float64)
    for text, vector in zip(TEXTS, Encoder.load(folder).encode(TEXTS).vectors, strict=True):
        ids = tokenizer.encode(E5_PREFIX + text, add_special_tokens=False).ids[:512]
        mean = sum(table[token] for token in ids) / len(ids)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), rtol=0, atol=1e-7)
