"""Transformer encoders without sentence-transformers, held to its vectors."""

from pathlib import Path

import numpy as np
import pytest

from loramux.router.backends import SentenceTransformerBackend
from loramux.router.encoder_files import inspect_encoder
from loramux.router.transformer_backend import Prepare, TransformerBackend, is_plain
from loramux.server.pool.routing import lay_out
from tests.unit.router.bert import write_e5
from tests.unit.router.kit import edit_json, write_json

TEXTS = [
    "anchor the vessel",
    "x",
    "",
    "How to ROAST garlic and onion?",
    "中文 ñ é",
    "sail mast " * 40,
    "\u0007",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_e5(tmp_path / "e5")


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("limit", [24, 512])
@pytest.mark.parametrize("prepare", [None, lay_out])
def test_both_backends_give_the_same_vectors(
    folder: Path, pooling: str, limit: int, prepare: Prepare | None
) -> None:
    write_json(folder / "1_Pooling" / "config.json", {"embedding_dimension": 384, "pooling_mode": pooling})
    files = inspect_encoder(folder)
    assert is_plain(files)
    ours = TransformerBackend(files, limit, "cpu", prepare)
    theirs = SentenceTransformerBackend(files, limit, "cpu")
    assert (ours.dimension, ours.max_tokens) == (theirs.dimension, theirs.max_tokens) == (384, limit)
    got, cut = ours.embed(TEXTS)
    want, want_cut = theirs.embed(TEXTS)
    # sentence-transformers applies the Normalize module of the folder as well.
    got /= np.linalg.norm(got, axis=1, keepdims=True)
    np.testing.assert_allclose(got, want, atol=2e-6)
    assert cut.tolist() == want_cut.tolist() == [False] * 5 + [limit < 80, False]


def test_the_stated_limit_is_the_models_own(folder: Path) -> None:
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 20, "do_lower_case": False})
    files = inspect_encoder(folder)
    assert TransformerBackend(files, 512, "cpu").max_tokens == 20
    assert SentenceTransformerBackend(files, 512, "cpu").max_tokens == 20
    vectors, cut = TransformerBackend(files, 512, "cpu").embed([])
    assert vectors.shape == (0, 384)
    assert cut.shape == (0,)


def test_what_it_would_compute_differently_is_left_to_sentence_transformers(folder: Path) -> None:
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 20, "do_lower_case": True})
    assert not is_plain(inspect_encoder(folder))
    edit_json(folder / "sentence_bert_config.json", lambda c: c.update(do_lower_case=False))
    write_json(folder / "1_Pooling" / "config.json", {"embedding_dimension": 384, "pooling_mode": "max"})
    assert not is_plain(inspect_encoder(folder))
    write_json(folder / "1_Pooling" / "config.json", {"embedding_dimension": 384, "pooling_mode": "mean"})
    assert is_plain(inspect_encoder(folder))
    (folder / "tokenizer.json").unlink()
    assert not is_plain(inspect_encoder(folder))
