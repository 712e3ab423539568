"""Rows, their chat rendering, and batches made of them."""

import json
import random

import numpy as np
import pytest

from loramux.adapters.training.batches import IGNORED, Batches, Source, collate, tempered_sources
from loramux.adapters.training.chat import EncodedRow, encode_rows
from loramux.adapters.training.errors import ChatError, OptionError, RowError
from loramux.adapters.training.rows import Row, find_data_files, read_rows, split_held_out, user_text
from loramux.adapters.training.tokenizer import train_tokenizer


def write(path, *records):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n")
    return path


def some_rows(count, seed=0):
    rng = random.Random(seed)
    words = ["red", "plum", "12", "río", "if x:\n    y", "🙂", "SELECT *", "  two  spaces"]
    return [
        Row(" ".join(rng.choices(words, k=4)) + f" {i}", rng.choice(["", "extra"]), rng.choice(words))
        for i in range(count)
    ]


def test_rows_are_read_and_other_keys_ignored(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"instruction": "Add", "input": "1 2", "output": "3", "domain": "math"},
        "",
        {"instruction": "Line\u2028separator", "output": "x"},
    )
    rows = read_rows([path])
    assert rows == [Row("Add", "1 2", "3"), Row("Line\u2028separator", "", "x")]
    assert [user_text(row) for row in rows] == ["Add\n1 2", "Line\u2028separator"]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"instruction": "a", "output": ', "not JSON"),
        ("[1]", "must be a JSON object"),
        ('{"instruction": "a"}', '"output" must be a string'),
        ('{"instruction": 3, "output": "x"}', '"instruction" must be a string'),
        ('{"instruction": " ", "output": "x"}', "both empty"),
    ],
)
def test_a_bad_line_is_named_with_file_and_number(tmp_path, line, why):
    path = write(tmp_path / "a.jsonl", {"instruction": "a", "output": "b"}, line)
    with pytest.raises(RowError, match=why) as caught:
        read_rows([path])
    assert str(caught.value).startswith(f"{path}:2:")


def test_a_folder_means_its_train_files_where_it_has_such(tmp_path):
    row = {"instruction": "a", "output": "b"}
    for name in ("b.train.jsonl", "a.train.jsonl", "a.test.jsonl"):
        write(tmp_path / name, row)
    assert [p.name for p in find_data_files([tmp_path])] == ["a.train.jsonl", "b.train.jsonl"]
    with pytest.raises(RowError, match="no such file"):
        find_data_files([tmp_path / "missing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(RowError, match=r"no \*.jsonl"):
        find_data_files([tmp_path / "empty"])


def test_the_split_depends_on_content_alone():
    rows = some_rows(400)
    kept, held = split_held_out(rows, 0.2)
    assert sorted(map(repr, kept + held)) == sorted(map(repr, rows))
    assert 40 < len(held) < 130
    shuffled = [*random.Random(1).sample(rows, len(rows)), Row("new", "", "row")]
    assert set(split_held_out(shuffled, 0.2)[1]) - {Row("new", "", "row")} == set(held)
    assert split_held_out(rows, 0.0) == (rows, [])
    with pytest.raises(OptionError, match="fraction"):
        split_held_out(rows, 1.0)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([some_rows(50)], vocabulary=320, context=256)


def test_any_text_survives_the_tokenizer_and_digits_stay_single(tokenizer):
    for text in ("héllo\t\x00 \n\n  1234567 ﷽🙂", "<not|special>", ""):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert len(tokenizer("1212", add_special_tokens=False)["input_ids"]) == 4


def test_an_encoded_row_is_the_rendered_chat(tokenizer):
    rows = some_rows(20, seed=3)
    for row, encoded in zip(rows, encode_rows(tokenizer, rows, 256), strict=True):
        prompt = f"<|bos|><|user|>{user_text(row)}<|end|><|assistant|>"
        assert tokenizer.decode(encoded.ids) == f"{prompt}{row.output}<|end|>"
        assert tokenizer.decode(encoded.ids[: encoded.answer_start]) == prompt
        chat = [
            {"role": "user", "content": user_text(row)},
            {"role": "assistant", "content": row.output},
        ]
        assert list(encoded.ids) == tokenizer.apply_chat_template(chat, return_dict=False)


def test_long_rows_are_cut_and_a_prompt_too_long_has_no_answer(tokenizer):
    row = Row("word " * 50, "", "answer " * 50)
    whole = encode_rows(tokenizer, [row], 10_000)[0]
    cut = encode_rows(tokenizer, [row], whole.answer_start + 3)[0]
    assert cut.ids == whole.ids[: whole.answer_start + 3]
    none = encode_rows(tokenizer, [row], 10)[0]
    assert none.answer_start == len(none) == 10


def test_a_tokenizer_without_template_or_end_is_refused(tokenizer):
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ChatError, match="chat template"):
        encode_rows(bare, some_rows(1), 64)
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(ChatError, match="end-of-sequence"):
        encode_rows(endless, some_rows(1), 64)


def encoded(lengths, first=10):
    return [EncodedRow(tuple(range(first + i, first + i + n)), n // 2) for i, n in enumerate(lengths)]


def test_targets_are_the_following_tokens():
    rows = encoded([4, 6])
    everything = collate(rows, pad_id=0, answers_only=False)
    answers = collate(rows, pad_id=0, answers_only=True)
    assert everything.ids.tolist() == [[10, 11, 12, 13, 0, 0], [11, 12, 13, 14, 15, 16]]
    skip = IGNORED
    assert everything.targets.tolist() == [[11, 12, 13, skip, skip, skip], [12, 13, 14, 15, 16, skip]]
    assert answers.targets.tolist() == [[skip, 12, 13, skip, skip, skip], [skip, skip, 14, 15, 16, skip]]
    assert (everything.count, answers.count) == (8, 5)


def test_every_row_comes_once_per_epoch_whatever_the_step_asked_first():
    rows = encoded(np.random.default_rng(0).integers(3, 40, 97).tolist())
    options = {"pad_id": 0, "step_tokens": 100, "batch_tokens": 64, "answers_only": False, "seed": 5}
    batches = Batches([Source(rows, 1.0)], **options)
    drawn = []
    steps = 0
    while len(drawn) < len(rows) or steps % 8:
        for batch in batches.step(steps):
            assert batch.ids.numel() <= 64
            drawn += [tuple(t for t in ids if t) for ids in batch.ids.tolist()]
        steps += 1
    assert set(drawn) == {row.ids for row in rows}
    assert max(drawn.count(ids) for ids in set(drawn)) <= 2
    again = Batches([Source(rows, 1.0)], **options)
    for step in (steps - 1, 0, 3):
        pairs = zip(batches.step(step), again.step(step), strict=True)
        assert all((a.ids == b.ids).all() for a, b in pairs)


def test_temperature_evens_out_the_sources():
    large, small = encoded([20] * 400, first=1000), encoded([20] * 25, first=5000)
    batches = Batches(
        tempered_sources([large, small, []], 0.5),
        pad_id=0,
        step_tokens=400,
        batch_tokens=200,
        answers_only=False,
        seed=0,
    )
    tokens = [t for step in range(40) for b in batches.step(step) for t in b.ids.flatten().tolist()]
    share = sum(t >= 5000 for t in tokens) / len(tokens)
    assert share == pytest.approx(1 / 5, abs=0.02)  # sqrt(500) / (sqrt(500) + sqrt(8000))
