"""Finding a base: by path, folder, package; its folder in the cache; what is refused, in one line."""

import json
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from loramux.server.base_files import BaseFiles
from loramux.server.build import load_tokenizer
from loramux.server.engine.gguf import folder as folders
from loramux.server.engine.gguf.folder import SOURCE_FILE
from loramux.server.engine.model import load_base
from loramux.server.errors import StartError
from loramux.server.memory.blueprint import Blueprint
from loramux.server.pool.training_base import load_training_base
from tests.gguf_kit import byte_level_tokenizer, logits, tiny, write_gguf

TOKENIZER = byte_level_tokenizer()
VOCABULARY = TOKENIZER.get_vocab_size()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in Q8_0, which no test may change."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    write_gguf(path, tiny("llama", VOCABULARY), TOKENIZER, type_of=lambda _: Type.Q8_0)
    return path


@pytest.fixture
def file(written: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(written.read_bytes())
    return path


def kept(cache: Path) -> list[str]:
    """What lies in the cache beside locks."""
    root = cache / "loramux" / "bases"
    return sorted(path.name for path in root.glob("*") if path.suffix != ".lock")


def test_a_file_its_folder_and_a_package_are_one_base(
    file: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "tiny_model_of_tests"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "data" / "tiny.gguf").write_bytes(file.read_bytes())
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    first = BaseFiles.locate(str(file))
    assert first.gguf == file
    assert first.id == "Tiny-Model"
    for given in (str(package / "data"), "tiny_model_of_tests", "tiny-model-of-tests"):
        other = BaseFiles.locate(given)
        assert (other.folder, other.id, other.content) == (first.folder, first.id, first.content)
        assert other.gguf == package / "data" / "tiny.gguf"
    made = BaseFiles.locate(first.folder)
    assert made.gguf is None
    assert made.weights() is None
    assert (made.folder, made.id, made.hash) == (first.folder, first.id, first.hash)
    assert kept(cache) == [Path(first.folder).name]
    assert "tiny_model_of_tests" not in sys.modules


def test_the_folder_serves_and_trains_like_any_other(file: Path) -> None:
    base = BaseFiles.locate(str(file))
    folder = Path(base.folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        SOURCE_FILE,
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    served = load_base(base.folder, device="cpu")
    assert served.dtype == torch.float32
    assert served.generation_config.eos_token_id == [2, 0]
    assert served.config.eos_token_id == 2
    assert served.config.architectures == ["LlamaForCausalLM"]
    trained, tokenizer = load_training_base(str(file), device="cpu")
    assert torch.equal(logits(trained), logits(served))
    assert tokenizer.chat_template == load_tokenizer(base.folder).chat_template is not None
    linears = Blueprint.read(base.folder).shapes("tiny").modules
    assert linears["model.layers.1.self_attn.k_proj"] == (32, 64)


def test_what_is_in_the_cache_is_not_made_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = BaseFiles.locate(str(file))
    monkeypatch.setattr(folders, "_make", lambda *_: pytest.fail("made twice"))
    assert BaseFiles.locate(str(file)).folder == first.folder


def test_another_content_is_another_base(file: Path, tmp_path: Path) -> None:
    """The last byte belongs to the last weight."""
    other = tmp_path / "other.gguf"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    other.write_bytes(data)
    one, two = BaseFiles.locate(str(file)), BaseFiles.locate(str(other))
    assert one.folder != two.folder
    assert one.hash != two.hash
    assert BaseFiles.locate(str(file), content=one.content).content == one.content
    with pytest.raises(StartError, match="its content is not what the pool was made with"):
        BaseFiles.locate(str(other), content=one.content)


def test_several_at_once_make_one_folder(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    make = folders._make
    monkeypatch.setattr(folders, "_make", lambda *given: (made.append(given[2]), make(*given)))
    results: list[str] = []
    threads = [
        threading.Thread(target=lambda: results.append(BaseFiles.locate(str(file)).folder)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(results)) == 1
    assert len(results) == 4
    assert len(made) == 1
    assert len(kept(cache)) == 1


def test_what_a_killed_process_left_is_cleared_away(file: Path, cache: Path) -> None:
    name = f"{folders.content_hash(file)[:24]}-{folders._FORMAT}"
    left = cache / "loramux" / "bases" / f"{name}.partial"
    left.mkdir(parents=True)
    (left / "model-00001-of-00009.safetensors").write_bytes(b"half")
    base = BaseFiles.locate(str(file))
    assert kept(cache) == [name]
    assert not list(Path(base.folder).glob("model-*"))


def test_a_model_without_a_name_is_called_like_its_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "My.model-Q8_0.gguf", tiny("llama", VOCABULARY), TOKENIZER, name=None)
    assert BaseFiles.locate(str(tmp_path / "My.model-Q8_0.gguf")).id == "My.model-Q8_0"


def test_names_that_lead_nowhere(tmp_path: Path, file: Path) -> None:
    (tmp_path / "two").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "two" / name).write_bytes(b"GGUF")
    for given, reason in [
        (str(tmp_path / "none.gguf"), "no such file"),
        (str(tmp_path / "two"), r"holds 2 GGUF files \(a.gguf, b.gguf\); name one of them"),
        ("json", "the package in .* holds no GGUF file"),
    ]:
        with pytest.raises(StartError, match=reason):
            BaseFiles.locate(given)
    for given in ("owner/name", "no_such_package_here", str(tmp_path)[1:]):
        assert BaseFiles.locate(given) == BaseFiles(given, given)
    (tmp_path / SOURCE_FILE).write_text("{")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(StartError, match=r"gguf_source.json is damaged"):
        BaseFiles.locate(str(tmp_path))


def test_a_cache_that_cannot_be_written_is_named(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "full"))
    with pytest.raises(
        StartError, match=r"cannot be written to .*full/loramux/bases: .*; set XDG_CACHE_HOME"
    ):
        BaseFiles.locate(str(file))


def plain(path: Path, **options: Any) -> None:
    write_gguf(path, tiny("llama", VOCABULARY), TOKENIZER, **options)


def renamed(old: bytes, new: bytes) -> Callable[[Path], None]:
    """A file with some bytes in the place of others of the same length, everywhere."""
    assert len(old) == len(new)

    def write(path: Path) -> None:
        plain(path)
        path.write_bytes(path.read_bytes().replace(old, new))

    return write


def other_type(number: int) -> Callable[[Path], None]:
    """A file whose norm of the last layer says that it is of another type."""

    def write(path: Path) -> None:
        plain(path)
        data = bytearray(path.read_bytes())
        place = data.index(b"output_norm.weight") + len(b"output_norm.weight") + 4 + 8
        data[place : place + 4] = number.to_bytes(4, "little")
        path.write_bytes(data)

    return write


def not_finite(path: Path) -> None:
    model = tiny("llama", VOCABULARY)
    model.get_input_embeddings().weight[3, 5] = float("nan")
    write_gguf(path, model, TOKENIZER)


def without_tensors(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


REFUSED: list[tuple[str, Callable[[Path], None], str]] = [
    ("empty", lambda path: path.write_bytes(b""), "not a GGUF file"),
    ("a text", lambda path: path.write_text("version https://git-lfs"), "does not begin with GGUF"),
    ("its magic alone", lambda path: path.write_bytes(b"GGUF"), "what stands at byte 4 goes beyond"),
    ("version 1", lambda path: path.write_bytes(b"GGUF" + bytes([1] + [0] * 40)), "version 1 is not read"),
    ("no tensors", without_tensors, "no token_embd.weight"),
    ("mamba", renamed(b"llama", b"mamba"), "architecture 'mamba' is not read; these are: llama, qwen2"),
    ("an unknown type", other_type(99), "tensor output_norm.weight has the unknown type 99"),
    ("an integer type", other_type(int(Type.I32)), "output_norm.weight is I32, which cannot"),
    ("experts", lambda path: plain(path, keys={"expert_count": 8}), "with experts in its layers"),
    ("no context", lambda path: plain(path, keys={"context_length": None}), "context_length is missing"),
    ("other heads", lambda path: plain(path, keys={"attention.head_count_kv": 1}), "its metadata make it"),
    ("half rotary", lambda path: plain(path, keys={"rope.dimension_count": 8}), "part of a head"),
    ("an odd scaling", lambda path: plain(path, keys={"rope.scaling.type": "longrope"}), "'longrope' is not"),
    (
        "odd frequencies",
        lambda path: plain(path, extra={"rope_freqs.weight": np.arange(1, 9, dtype=np.float32)}),
        "rope_freqs.weight is not the scaling of Llama 3",
    ),
    ("a stray tensor", lambda path: plain(path, extra={"vision.weight": np.ones(4, "f")}), "vision.weight"),
    ("more layers", lambda path: plain(path, keys={"block_count": 3}), "it holds 2 layers, not 3"),
    ("fewer layers", lambda path: plain(path, keys={"block_count": 1}), "it holds 2 layers, not 1"),
    (
        "a missing tensor",
        renamed(b"blk.0.attn_q.weight", b"blk.0.attn_q.weighs"),
        "tensor blk.0.attn_q.weighs is unknown in a llama model",
    ),
    ("no norm", renamed(b"blk.1.attn_norm", b"blk.1.ffn_norm2"), "tensor blk.1.ffn_norm2.weight is unknown"),
    ("norms twice", renamed(b"blk.1.attn_norm.", b"blk.01.ffn_norm."), "holds 3 layers, not 2"),
    ("no tokenizer", renamed(b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenz"), "it holds no tokenizer"),
    ("not a number", not_finite, "damaged: tensor token_embd.weight holds a value that is no finite number"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("write", "reason"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_what_cannot_be_used_is_one_line_and_leaves_nothing(
    write: Callable[[Path], None], reason: str, tmp_path: Path, cache: Path
) -> None:
    path = tmp_path / "bad.gguf"
    write(path)
    with pytest.raises(StartError, match=reason) as raised:
        BaseFiles.locate(str(path))
    assert str(raised.value).startswith(f"base model {path}: ")
    assert "\n" not in str(raised.value)
    assert kept(cache) == []


def test_a_file_cut_short_anywhere_is_refused(file: Path, cache: Path) -> None:
    whole = file.read_bytes()
    source = random.Random(2)
    for length in [*(source.randrange(len(whole)) for _ in range(60)), len(whole) - 1]:
        file.write_bytes(whole[:length])
        with pytest.raises(StartError, match=r"truncated|not a GGUF file"):
            BaseFiles.locate(str(file))
    assert kept(cache) == []


def test_a_damaged_header_is_refused_or_harmless(file: Path) -> None:
    """Whatever a byte of the head becomes: a line of ours, or a folder."""
    whole = file.read_bytes()
    head = whole.index(b"blk.0.attn_q.weight") + 60
    source = random.Random(3)
    refused: list[str] = []
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(source.choice((1, 1, 3))):
            data[source.randrange(4, head)] = source.choice((0, 1, 127, 255, source.randrange(256)))
        file.write_bytes(data)
        try:
            BaseFiles.locate(str(file))
        except StartError as error:
            refused.append(str(error))
    assert len(refused) > 20
    assert not [line for line in refused if "\n" in line]


def test_the_record_of_the_source_is_plain(file: Path) -> None:
    base = BaseFiles.locate(str(file))
    assert json.loads((Path(base.folder) / SOURCE_FILE).read_text()) == {
        "id": "Tiny-Model",
        "sha256": base.content,
        "file": "tiny.gguf",
    }
