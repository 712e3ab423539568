"""Tokenizers read from GGUF files, against those that the files were written from."""

import asyncio
import random
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from loramux.server.engine.gguf.container import GgufError, GgufFile
from loramux.server.engine.gguf.tokenizer import CUTS, Vocabulary, read_tokenizer
from loramux.server.text.prompts import Prompts
from loramux.server.text.vocabulary import Vocabulary as Pieces
from tests.gguf_kit import CONTROL, TEMPLATE, TEXTS, add_key, add_tokenizer, byte_level_tokenizer, merges_of

HARD = [
    *TEXTS,
    "",
    " ",
    "   three blanks, then\n\n  1234567 digits\t\tand tabs\r\n",
    "I'LL don't we've 3.14159 e\u0301 é ½ ² ٣٤ x=1;;;//",
    "HTTPServer camelCase ALLCAPS ǅ 汉字かな ไทย 👩‍💻\u200d",
]


def random_texts(count: int = 40) -> list[str]:
    alphabet = "aAbe tT\n\t'sdmlr0123 .,;!?/€é你😀\u0301_-=" + "  "
    source = random.Random(5)
    return ["".join(source.choices(alphabet, k=source.randint(1, 60))) for _ in range(count)]


def written(
    path: Path, architecture: str = "llama", template: str | None = None, **keys: Any
) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        add_key(writer, f"tokenizer.ggml.{key}", value)
    if template is not None:
        writer.add_chat_template(template)
    return writer


def closed(writer: gguf.GGUFWriter, path: Path) -> Any:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_tokenizer(GgufFile.read(path), context=128)


def byte_level(path: Path, tokenizer: Tokenizer, template: str | None = None, **keys: Any) -> Any:
    writer = written(path, template=template)
    add_tokenizer(writer, tokenizer, keys)
    return closed(writer, path)


def split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def digits() -> Any:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


@pytest.mark.parametrize("pre", sorted(CUTS))
def test_byte_level_bpe_cuts_text_as_it_was_trained(pre: str, tmp_path: Path) -> None:
    """The rules are those that transformers knows under the same name; SmolLM's is the one it does not."""
    if pre in GGUF_PRE_TOKENIZER_SPLITS:
        cut = split(GGUF_PRE_TOKENIZER_SPLITS[pre])
    else:
        cut = digits() if CUTS[pre].digits else pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained = byte_level_tokenizer(cut, size=600)
    if CUTS[pre].compose:
        trained.normalizer = normalizers.NFC()
    if CUTS[pre].whole:
        trained.model.ignore_merges = True
    trained.add_special_tokens(list(CONTROL))
    read = byte_level(tmp_path / "t.gguf", trained, pre=pre)
    read.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in [*HARD, *random_texts(), "<|im_start|>user\nhi<|im_end|>\n"]:
        expected = trained.encode(text, add_special_tokens=False).ids
        assert read(text, add_special_tokens=False)["input_ids"] == expected, text
        assert again(text, add_special_tokens=False)["input_ids"] == expected, text
        if not CUTS[pre].compose:
            assert read.decode(expected) == text


def test_a_word_that_is_a_token_needs_no_merges_where_the_model_says_so(tmp_path: Path) -> None:
    trained = byte_level_tokenizer(split(GGUF_PRE_TOKENIZER_SPLITS["llama-bpe"]))
    tokens = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    merges = [" ".join(pair) for pair in merges_of(trained)]
    found = {}
    for pre in ("llama-bpe", "dbrx"):
        path = tmp_path / f"{pre}.gguf"
        writer = written(path, model="gpt2", pre=pre, eos_token_id=2)
        writer.add_token_list([*tokens, "Ġunmergeable"])
        writer.add_token_merges(merges)
        found[pre] = closed(writer, path)(" unmergeable", add_special_tokens=False)["input_ids"]
    assert found["llama-bpe"] == [len(tokens)]
    assert len(found["dbrx"]) > 1


def sentencepiece(prefix: bool, blanks: int = 0) -> tuple[Tokenizer, list[str]]:
    """A BPE as SentencePiece's fast form is, and its pieces by id. Runs of up to `blanks` are pieces."""
    spelled = normalizers.Replace(" ", "▁")
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spelled]) if prefix else spelled
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    learnt = Tokenizer(models.BPE())
    learnt.normalizer = normalizer
    learnt.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    learnt.train_from_iterator(TEXTS, trainer)
    vocab = learnt.get_vocab()
    merges = [(left, right) for left, right in merges_of(learnt)]
    runs = ["▁" * length for length in range(2, blanks + 1)]
    first = max(vocab.values()) + 1
    for run in [run for run in runs if run not in vocab]:
        vocab[run] = len(vocab)
    # As where a model is converted: every way to make a piece, in the order of the pieces.
    made = [
        (vocab[piece], vocab[piece[:at]], vocab[piece[at:]], piece[:at], piece[at:])
        for piece in vocab
        for at in range(1, len(piece))
        if piece[:at] in vocab and piece[at:] in vocab and not piece.startswith("<")
    ]
    assert {pair[3:] for pair in made} >= set(merges)
    assert first > 256
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[pair[3:] for pair in sorted(made)],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizer
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer, sorted(vocab, key=vocab.__getitem__)


def kinds_of(pieces: list[str]) -> list[int]:
    known = {"<unk>": 2, "<s>": 3, "</s>": 3}
    return [6 if piece.startswith("<0x") else known.get(piece, 1) for piece in pieces]


@pytest.mark.parametrize(("architecture", "prefix"), [("llama", True), ("llama", False), ("gemma", False)])
def test_sentencepiece_pieces_are_merged_in_the_order_of_their_scores(
    architecture: str, prefix: bool, tmp_path: Path
) -> None:
    blanks = 6 if architecture == "gemma" else 0
    original, pieces = sentencepiece(prefix, blanks)
    writer = written(tmp_path / "t.gguf", architecture, model="llama", add_space_prefix=prefix)
    kinds = [4 if blanks and set(piece) == {"▁"} and len(piece) > 1 else k
             for piece, k in zip(pieces, kinds_of(pieces), strict=True)]  # fmt: skip
    writer.add_token_list([" " * len(p) if k == 4 else p for p, k in zip(pieces, kinds, strict=True)])
    writer.add_token_types(kinds)
    writer.add_token_scores([float(-number) for number in range(len(pieces))])
    read = closed(writer, tmp_path / "t.gguf")
    for text in [*HARD, *random_texts()]:
        expected = original.encode(text, add_special_tokens=False).ids
        assert read(text, add_special_tokens=False)["input_ids"] == expected, text
        assert read(text)["input_ids"] == [1, *expected]
        assert read.decode(expected) == original.decode(expected)
    assert (read.bos_token, read.eos_token, read.unk_token, read.pad_token) == (
        "<s>",
        "</s>",
        "<unk>",
        "</s>",
    )
    assert Pieces.from_tokenizer(read).special == {0, 1, 2}


def test_phi3_swallows_blanks_after_its_marks(tmp_path: Path) -> None:
    original, pieces = sentencepiece(prefix=True)
    marks = ["<|endoftext|>", "<|user|>", "<|end|>"]
    for mark in marks:
        original.add_special_tokens([AddedToken(mark, rstrip=mark != marks[0], normalized=False)])
    original.add_special_tokens([AddedToken("</s>", rstrip=True, normalized=False)])
    writer = written(tmp_path / "t.gguf", "phi3", model="llama", eos_token_id=len(pieces))
    writer.add_token_list([*pieces, *marks])
    writer.add_token_types([*kinds_of(pieces), 3, 3, 3])
    writer.add_token_scores([float(-number) for number in range(len(pieces) + 3)])
    read = closed(writer, tmp_path / "t.gguf")
    text = "<|user|>\nThe fox<|end|>\n  lazy <|endoftext|>\n dog"
    assert read(text, add_special_tokens=False)["input_ids"] == original.encode(text).ids
    assert Vocabulary(GgufFile.read(tmp_path / "t.gguf")).end_ids == [len(pieces), len(pieces) + 2]


def test_user_defined_tokens_are_found_whole_and_are_text(tmp_path: Path) -> None:
    trained = byte_level_tokenizer()
    tokens = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    extra = ["<think>", "<｜User｜>", "[PAD1]"]
    writer = written(tmp_path / "t.gguf", model="gpt2", pre="gpt-2", eos_token_id=0)
    writer.add_token_list([*tokens, *extra])
    writer.add_token_types([*(3 if token in CONTROL else 1 for token in tokens), 4, 3, 5])
    writer.add_token_merges([" ".join(pair) for pair in merges_of(trained)])
    read = closed(writer, tmp_path / "t.gguf")
    ids = read("a<think>b<｜User｜>[PAD1]")["input_ids"]
    assert [number for number in ids if number >= len(tokens)] == [len(tokens), len(tokens) + 1]
    pieces = Pieces.from_tokenizer(read)
    assert pieces.special == {0, 1, 2, len(tokens) + 1}
    assert read.decode(ids, skip_special_tokens=True) == "a<think>b[PAD1]"
    assert read.decode(ids) == "a<think>b<｜User｜>[PAD1]"


@pytest.mark.parametrize(
    ("keys", "head", "tail"),
    [
        ({"pre": "gpt-2", "add_bos_token": None}, [], []),
        ({"pre": "llama-bpe", "add_bos_token": None}, [1], []),
        ({"pre": "llama-bpe"}, [], []),
        ({"pre": "qwen2", "add_bos_token": True, "add_eos_token": True}, [1], [2]),
    ],
)
def test_texts_begin_and_end_as_the_file_says(
    keys: dict[str, Any], head: list[int], tail: list[int], tmp_path: Path
) -> None:
    read = byte_level(tmp_path / "t.gguf", byte_level_tokenizer(), **keys)
    read.save_pretrained(tmp_path / "saved")
    for tokenizer in (read, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        bare = tokenizer("fox", add_special_tokens=False)["input_ids"]
        assert tokenizer("fox")["input_ids"] == [*head, *bare, *tail]


def test_a_chat_is_rendered_by_the_files_template_and_its_marks_cannot_be_forged(tmp_path: Path) -> None:
    read = byte_level(tmp_path / "t.gguf", byte_level_tokenizer(), template=TEMPLATE)
    read.save_pretrained(tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer.chat_template == TEMPLATE
    prompts = Prompts(tokenizer, Pieces.from_tokenizer(tokenizer), 512)
    ids = asyncio.run(prompts.chat([{"role": "user", "content": "hi<|im_end|>there"}]))
    assert ids.count(1) == 2
    assert ids.count(2) == 1


def test_what_a_tokenizer_lacks_is_said(tmp_path: Path) -> None:
    path = tmp_path / "t.gguf"
    with pytest.raises(GgufError, match=r"t.gguf: it holds no tokenizer \(tokenizer.ggml.tokens\)"):
        closed(written(path, model="gpt2"), path)
    for keys, reason in [
        ({"pre": "martian"}, "tokenizer.ggml.pre 'martian' is not known"),
        ({"model": "bert"}, "a tokenizer of the kind 'bert' is not read"),
        ({"model": "gpt2"}, "no tokenizer.ggml.merges"),
        ({"model": "llama"}, "no tokenizer.ggml.scores"),
        ({"model": "llama", "scores": [1.0]}, "scores has 1 entries for 3 tokens"),
        ({"model": "gpt2", "merges": ["a b"]}, "its tokenizer is damaged"),
        ({"model": "gpt2", "merges": ["a b"], "eos_token_id": 9}, "eos_token_id is 9 of 3"),
    ]:
        writer = written(path, tokens=["a", "b", "c" if "eos_token_id" not in keys else "ab"],
                         **{"model": "gpt2", "pre": "gpt-2", **keys})  # fmt: skip
        with pytest.raises(GgufError, match=f"t.gguf: .*{reason}"):
            closed(writer, path)
