"""The layout of real E5 repositories: a BERT of e5-small's shape, with and without modules.json."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import BertModel

from loramux.router.encoder import Encoder
from loramux.router.errors import RouterFileError
from tests.unit.router.bert import wordpiece, write_e5, write_plain
from tests.unit.router.kit import edit_json

TEXTS = ["anchor the vessel", "x", "how to roast garlic and onion?", "中文 ñ é", "sail " * 60]


@pytest.fixture(scope="module")
def e5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_e5(tmp_path_factory.mktemp("encoders") / "e5")


def reference(folder: Path, texts: list[str]) -> npt.NDArray[np.float32]:
    """Masked mean of the last hidden state and L2 norm, as the E5 model card computes it."""
    model = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    batch = wordpiece()(
        [f"query: {text}" for text in texts],
        max_length=512,
        padding=True,
        truncation=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
    vectors: npt.NDArray[np.float32] = torch.nn.functional.normalize(mean, dim=1).numpy()
    return vectors


def test_the_e5_layout_gives_the_model_cards_vectors(e5: Path) -> None:
    encoder = Encoder.load(e5)
    spec = encoder.spec
    assert (spec.pooling, spec.dimension, spec.max_tokens, spec.prefix) == ("mean", 384, 512, "query: ")
    got = encoder.encode(TEXTS)
    np.testing.assert_allclose(got.vectors, reference(e5, TEXTS), atol=2e-6)
    assert not got.truncated.any()


def test_a_plain_model_directory_gets_mean_pooling_and_the_norm(tmp_path: Path) -> None:
    folder = write_plain(tmp_path / "plain")
    assert not (folder / "modules.json").exists()
    encoder = Encoder.load(folder, id="intfloat/e5-small-v2")
    assert (encoder.spec.id, encoder.spec.pooling) == ("intfloat/e5-small-v2", "mean")
    np.testing.assert_allclose(encoder.encode(TEXTS).vectors, reference(folder, TEXTS), atol=2e-6)


def test_over_512_tokens_is_cut_and_marked(e5: Path) -> None:
    # "[CLS] query : " and "[SEP]" take 4 of the 512 tokens.
    texts = ["anchor " * 508, "anchor " * 509, "anchor " * 700]
    got = Encoder.load(e5).encode(texts)
    assert got.truncated.tolist() == [False, True, True]
    np.testing.assert_allclose(got.vectors[1], got.vectors[2], atol=2e-6)


def test_a_default_prompt_in_the_repository_is_not_added_to_ours(e5: Path) -> None:
    (e5 / "config_sentence_transformers.json").write_text(
        '{"prompts": {"query": "query: "}, "default_prompt_name": "query"}'
    )
    try:
        got = Encoder.load(e5).encode(TEXTS[:2]).vectors
    finally:
        (e5 / "config_sentence_transformers.json").unlink()
    np.testing.assert_allclose(got, reference(e5, TEXTS[:2]), atol=2e-6)


def test_a_broken_configuration_is_one_line(e5: Path, tmp_path: Path) -> None:
    folder = write_plain(tmp_path / "plain")
    edit_json(folder / "config.json", lambda config: config.update(num_attention_heads=7))
    with pytest.raises(RouterFileError) as caught:
        Encoder.load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
