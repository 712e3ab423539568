"""Both classifiers against plain formulas, and what they refuse."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertForSequenceClassification

from loramux.router.classifier import LinearClassifier, TransformerClassifier
from loramux.router.errors import RouterError, RouterFileError
from tests.unit.router.bert import wordpiece, write_classifier
from tests.unit.router.kit import edit_json

EXPERTS = ["harbour", "kitchen", "garden"]
TEXTS = ["anchor the vessel", "roast garlic", "", "mulch " * 900]


def test_linear_is_the_softmax_of_a_float64_product() -> None:
    generator = np.random.default_rng(1)
    weight, bias = generator.normal(size=(5, 9)), generator.normal(size=5)
    vectors = generator.normal(size=(31, 9)).astype(np.float32)
    head = LinearClassifier(weight.astype(np.float32), bias.astype(np.float32))
    got = head.probabilities([""] * 31, vectors)
    logits = vectors @ weight.T + bias
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert got.dtype == np.float32
    one = head.probabilities([""], vectors[4:5])
    np.testing.assert_allclose(one[0], got[4], rtol=1e-6)


def test_linear_survives_huge_logits_and_no_rows() -> None:
    head = LinearClassifier(np.full((2, 1), 5000, np.float32), np.array([0, -3000], np.float32))
    np.testing.assert_array_equal(head.probabilities(["a"], np.ones((1, 1), np.float32)), [[1.0, 0.0]])
    assert head.probabilities([], np.zeros((0, 1), np.float32)).shape == (0, 2)


@pytest.mark.parametrize(
    ("weight", "bias"),
    [(np.ones((3, 2)), np.ones(2)), (np.ones(3), np.ones(3)), (np.full((2, 2), np.inf), np.ones(2))],
)
def test_linear_refuses_parts_that_do_not_fit(weight: np.ndarray, bias: np.ndarray) -> None:
    with pytest.raises(RouterError):
        LinearClassifier(weight.astype(np.float32), bias.astype(np.float32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    labels = {0: "garden", 1: "harbour", 2: "kitchen"}
    return write_classifier(tmp_path_factory.mktemp("classifier") / "bert", labels)


def test_transformer_columns_follow_the_experts(folder: Path) -> None:
    head = TransformerClassifier.load(folder, EXPERTS, prefix="query: ")
    got = head.probabilities(TEXTS, np.zeros((4, 1), np.float32))
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    for row, text in enumerate(TEXTS):
        batch = wordpiece()([f"query: {text}"], truncation=True, max_length=512, return_tensors="pt")
        with torch.inference_mode():
            expected = torch.softmax(model(**batch).logits[0].double(), -1)
        np.testing.assert_allclose(got[row], expected[[1, 2, 0]], atol=1e-5)
    assert head.probabilities([], np.zeros((0, 1), np.float32)).shape == (0, 3)


@pytest.mark.parametrize(
    "experts", [["harbour", "kitchen"], ["harbour", "kitchen", "garden", "x"], ["a", "b", "c"]]
)
def test_transformer_labels_must_be_the_experts(folder: Path, experts: list[str]) -> None:
    with pytest.raises(RouterFileError, match="id2label") as caught:
        TransformerClassifier.load(folder, experts)
    assert caught.value.field == "id2label"


@pytest.mark.parametrize(
    "labels",
    [
        None,
        {},
        {"0": "harbour", "1": "kitchen", "2": "kitchen"},
        {"x": "harbour"},
        {"0": "harbour", "5": "kitchen"},
    ],
)
def test_transformer_refuses_odd_label_maps(tmp_path: Path, labels: object) -> None:
    folder = write_classifier(tmp_path / "bert", {0: "garden", 1: "harbour", 2: "kitchen"})
    edit_json(folder / "config.json", lambda config: config.update(id2label=labels))
    with pytest.raises(RouterFileError, match="id2label"):
        TransformerClassifier.load(folder, EXPERTS)


def test_transformer_refuses_pickles_and_code(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "bert", {0: "garden", 1: "harbour", 2: "kitchen"})
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(RouterFileError, match="safetensors"):
        TransformerClassifier.load(folder, EXPERTS)
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    edit_json(folder / "config.json", lambda config: config.update(auto_map={"AutoModel": "m.M"}))
    with pytest.raises(RouterFileError, match="auto_map"):
        TransformerClassifier.load(folder, EXPERTS)
