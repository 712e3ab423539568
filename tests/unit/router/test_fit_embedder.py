"""Training an embedder: it learns, repeats itself, and is an ordinary sentence-transformers directory."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from loramux.router.encoder import E5_PREFIX, Encoder
from loramux.router.encoder_files import read_tokenizer
from loramux.router.errors import RouterError, RouterFileError
from loramux.router.fit.clusters import kmeans, pair_vectors
from loramux.router.fit.embedder import EmbedderOptions, train_embedder, train_tokenizer
from tests.unit.router.kit import TOPICS, topic_pairs

OPTIONS = EmbedderOptions(
    dimension=32, vocab_size=500, epochs=6, batch_size=64, learning_rate=0.05, half=False
)


def test_it_learns_the_topics_without_seeing_them(tmp_path: Path) -> None:
    pairs, labels = topic_pairs(600, seed=21)
    steps: list[tuple[int, int, float]] = []
    loss = train_embedder(pairs, tmp_path / "e", OPTIONS, progress=lambda *step: steps.append(step))
    assert [number for number, _, _ in steps] == list(range(1, steps[0][1] + 1))
    assert loss < steps[0][2]
    encoder = Encoder.load(tmp_path / "e")
    vectors = [encoder.encode([pair[side] for pair in pairs]).vectors for side in (0, 1)]
    found = kmeans(pair_vectors(*vectors), len(TOPICS), seed=1)
    purity = sum(np.bincount(labels[found.labels == c]).max() for c in range(len(found.sizes))) / len(labels)
    assert purity > 0.9


def test_the_same_seed_gives_the_same_files_and_half_precision_halves_them(tmp_path: Path) -> None:
    pairs, _ = topic_pairs(120, seed=22)
    options = EmbedderOptions(dimension=16, vocab_size=400, epochs=2, batch_size=32)
    for name in ("a", "b"):
        train_embedder(pairs, tmp_path / name, options)
    first, second = (tmp_path / name / "model.safetensors" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    table = load_file(first)["embedding.weight"]
    assert table.dtype == np.float16
    assert Encoder.load(tmp_path / "a").spec == Encoder.load(tmp_path / "b").spec


def test_it_is_an_ordinary_sentence_transformers_directory(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    pairs, _ = topic_pairs(120, seed=23)
    train_embedder(pairs, tmp_path / "e", OPTIONS)
    model = SentenceTransformer(str(tmp_path / "e"), device="cpu", local_files_only=True)
    texts = [text for text, _ in pairs[:20]] + ["anchor " * 700]
    by_prompt = model.encode(texts, prompt_name="query", show_progress_bar=False)
    np.testing.assert_allclose(Encoder.load(tmp_path / "e").encode(texts).vectors, by_prompt, atol=1e-5)
    assert model.prompts["query"] == E5_PREFIX
    assert not (tmp_path / "e.partial").exists()


def test_a_given_tokenizer_is_kept_and_an_old_directory_replaced(tmp_path: Path) -> None:
    pairs, _ = topic_pairs(80, seed=24)
    tokenizer = train_tokenizer([text for text, _ in pairs], 320)
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "stale").touch()
    train_embedder(pairs, tmp_path / "e", EmbedderOptions(dimension=8, epochs=1), tokenizer=tokenizer)
    assert not (tmp_path / "e" / "stale").exists()
    rows = load_file(tmp_path / "e" / "model.safetensors")["embedding.weight"].shape
    assert rows == (tokenizer.get_vocab_size(), 8)


def test_rows_without_text_output_or_contrast_are_refused(tmp_path: Path) -> None:
    for pairs in ([], [("a", "b")], [("a", "same"), ("b", " SAME ")], [("", "x"), ("y", " "), ("z", "w")]):
        with pytest.raises(RouterError, match="at least 2 rows"):
            train_embedder(pairs, tmp_path / "e", OPTIONS)


@pytest.mark.parametrize(
    ("option", "value"),
    [("dimension", 0), ("vocab_size", 256), ("batch_size", 1), ("epochs", 0), ("scale", -1)],
)
def test_impossible_options_are_named(option: str, value: float) -> None:
    with pytest.raises(RouterError, match=option):
        EmbedderOptions(**{option: value})  # type: ignore[arg-type]


def test_the_tokenizer_reads_any_string_whatever_its_case() -> None:
    tokenizer = train_tokenizer(["anchor keel"] * 10, 300)
    text = "ANCHOR keel, 锚 \x00 🚢"
    ids = tokenizer.encode(text).ids
    assert ids == tokenizer.encode(text.lower()).ids
    assert tokenizer.decode(ids).strip() == text.lower()


def test_the_command_trains_from_jsonl_with_a_given_tokenizer(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from loramux.server.cli.train import app

    pairs, _ = topic_pairs(60, seed=25)
    rows = [{"instruction": text, "input": "", "output": output} for text, output in pairs]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train_tokenizer([text for text, _ in pairs], 320).save(str(tmp_path / "tokenizer.json"))
    out = tmp_path / "encoder"
    arguments = [
        "embedder",
        "--data",
        str(tmp_path / "rows.jsonl"),
        "--out",
        str(out),
        "--dimension",
        "12",
        "--full",
    ]
    done = CliRunner().invoke(app, [*arguments, "--tokenizer", str(tmp_path / "tokenizer.json")])
    assert done.exit_code == 0, done.output
    assert "trained on 60 rows" in done.output
    assert Encoder.load(out).spec.dimension == 12
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(RouterFileError, match=r"tokenizer\.json: not a tokenizer"):
        read_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(RouterFileError, match="file is missing"):
        read_tokenizer(tmp_path / "none.json")
