"""The training loop, a base from scratch, experts on it: losses fall, killed runs go on as if nothing was."""

import dataclasses
import json
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.peft_format import read_lora
from loramux.adapters.training import checkpoint, loop
from loramux.adapters.training.base import BaseOptions, train_base
from loramux.adapters.training.chat import encode_rows
from loramux.adapters.training.errors import CheckpointError, DivergedError, OptionError
from loramux.adapters.training.evaluate import loss_per_token
from loramux.adapters.training.expert import ExpertOptions, train_expert
from loramux.adapters.training.loop import LoopOptions
from loramux.adapters.training.muon import Muon, orthogonalise
from loramux.adapters.training.rows import Row

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

TINY = BaseOptions(
    vocabulary=300,
    hidden=32,
    layers=2,
    heads=4,
    kv_heads=2,
    ffn=48,
    context=128,
    max_tokens=64,
    step_tokens=256,
    batch_tokens=128,
    held_out=0.1,
)


def rows_of(kind, count=60):
    rng = random.Random(kind)
    names = ["ann", "bob", "cat", "dan"]
    return [
        Row(f"{kind}: what does {rng.choice(names)} say, {i}?", "", f"{kind} {kind} yes")
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for kind in ("moo", "oink"):
        lines = [json.dumps(dataclasses.asdict(row)) for row in rows_of(kind)]
        (folder / f"{kind}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def base(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("base")
    report = train_base([data], out, TINY, max_steps=40)
    assert report.steps == 40
    return out


def load(base):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval().requires_grad_(False)
    return model, AutoTokenizer.from_pretrained(base)


def test_a_base_is_an_ordinary_directory_that_generates_and_has_learnt(base, data):
    model, tokenizer = load(base)
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert model.config.tie_word_embeddings
    assert (
        model.generation_config.eos_token_id == tokenizer.eos_token_id == tokenizer("<|end|>")["input_ids"][1]
    )
    with safe_open(base / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "moo?"}], add_generation_prompt=True, return_tensors="pt"
    )
    assert (
        model.generate(**chat, max_new_tokens=3, do_sample=False).shape[1] <= chat["input_ids"].shape[1] + 3
    )
    unseen = encode_rows(tokenizer, rows_of("moo", 70)[60:], 64)
    loss = loss_per_token(model, unseen, pad_id=tokenizer.pad_token_id, answers_only=False)
    assert loss < 4.0  # ln(300) = 5.7 untrained


def test_token_losses_are_the_plain_cross_entropy(base):
    model, tokenizer = load(base)
    rows = encode_rows(tokenizer, rows_of("oink", 7), 64)
    expected, count = 0.0, 0
    with torch.inference_mode():
        for row in rows:
            ids = torch.tensor([row.ids])
            logits = model.double()(ids).logits[0, row.answer_start - 1 : -1]
            expected += float(cross_entropy(logits, ids[0, row.answer_start :], reduction="sum"))
            count += len(row) - row.answer_start
    measured = loss_per_token(model.float(), rows, pad_id=tokenizer.pad_token_id, batch_tokens=100)
    assert measured == pytest.approx(expected / count, rel=1e-5)


def test_a_killed_base_run_ends_with_the_same_weights(base, data, tmp_path, monkeypatch):
    real = checkpoint.save
    saves = []

    def save_and_die(*arguments):
        real(*arguments)
        saves.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save_and_die)
    options = LoopOptions(max_steps=40, max_minutes=None, checkpoint_minutes=0.0)
    monkeypatch.setattr("loramux.adapters.training.base.LoopOptions", lambda **_: options)
    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            train_base([data], tmp_path, TINY, max_steps=40)
    assert [save[2].step for save in saves] == [1, 2, 3, 4, 5]
    monkeypatch.setattr(checkpoint, "save", real)
    train_base([data], tmp_path, TINY, max_steps=40)
    whole, resumed = load_file(base / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.fixture(scope="module")
def expert(base, tmp_path_factory):
    model, tokenizer = load(base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    out = tmp_path_factory.mktemp("pool") / "moo"
    options = ExpertOptions(rank=4, alpha=8, rate=1e-2, epochs=3, step_tokens=256, batch_tokens=128)
    rows = rows_of("moo", 80)
    arguments = (model, tokenizer, rows[:60], rows[60:], out, options)
    report = train_expert(*arguments, base_id="tiny-base")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    return out, report, arguments


def test_an_expert_beats_the_base_and_is_an_ordinary_peft_directory(expert, base):
    from peft import PeftModel

    out, report, (_, tokenizer, _, unseen, _, _) = expert
    assert report.expert_loss < report.base_loss - 0.2
    assert (report.rows, report.held_out_rows) == (60, 20)
    assert sorted(p.name for p in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert str(out.parent) not in (out / "adapter_config.json").read_text()
    adapter = read_lora(out, id="moo", base=BaseShapes.from_config_dir(base, "tiny-base"))
    assert set(adapter.ranks.values()) == {4}
    assert len(adapter.pairs) == 14
    assert adapter.dtype == torch.bfloat16
    fresh, _ = load(base)
    again = PeftModel.from_pretrained(fresh, out)
    measured = loss_per_token(again, encode_rows(tokenizer, unseen, 512), pad_id=tokenizer.pad_token_id)
    assert measured == pytest.approx(report.expert_loss, abs=0.02)


def test_a_finished_expert_is_not_trained_again_unless_its_inputs_change(expert, monkeypatch):
    _, report, (model, tokenizer, rows, unseen, out, options) = expert
    calls = []
    real = loop.token_losses
    monkeypatch.setattr(loop, "token_losses", lambda *a: calls.append(1) or real(*a))
    assert train_expert(model, tokenizer, rows, unseen, out, options, base_id="tiny-base") == report
    assert not calls
    fewer = train_expert(model, tokenizer, rows[:30], unseen, out, options, base_id="tiny-base")
    assert calls
    assert fewer.rows == 30


def test_a_killed_expert_goes_on_where_it_was(expert, base, tmp_path, monkeypatch):
    _, _, (_, tokenizer, rows, unseen, _, options) = expert
    model, _ = load(base)
    whole = train_expert(model, tokenizer, rows, unseen, tmp_path / "whole", options, base_id="b")
    real, ticks = loop._step, []

    def die_later(*arguments):
        ticks.append(1)
        if len(ticks) == 5:
            raise KeyboardInterrupt
        return real(*arguments)

    every_step = dataclasses.replace(
        LoopOptions(max_steps=whole.steps, max_minutes=None), checkpoint_minutes=0
    )
    monkeypatch.setattr("loramux.adapters.training.run.LoopOptions", lambda **_: every_step)
    monkeypatch.setattr(loop, "_step", die_later)
    with pytest.raises(KeyboardInterrupt):
        train_expert(model, tokenizer, rows, unseen, tmp_path / "cut", options, base_id="b")
    assert not (tmp_path / "cut").exists()
    ticks.extend([1] * 10)
    train_expert(model, tokenizer, rows, unseen, tmp_path / "cut", options, base_id="b")
    assert len(ticks) == 15 + whole.steps - 4
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_expert_trains_on_a_4_bit_base(base, tmp_path):
    from loramux.server.pool.training_base import load_training_base

    model, tokenizer = load_training_base(str(base), quantization="nf4", device="cpu")
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    rows = rows_of("oink", 40)
    options = ExpertOptions(rank=2, alpha=4, rate=1e-2, epochs=4, step_tokens=256, batch_tokens=128)
    report = train_expert(model, tokenizer, rows[:30], rows[30:], tmp_path / "e", options, base_id="b")
    assert report.expert_loss < report.base_loss - 0.1


def test_impossible_options_are_refused(base, tmp_path):
    model, tokenizer = load(base)
    rows = rows_of("moo", 4)
    with pytest.raises(OptionError, match="no module called nope"):
        train_expert(model, tokenizer, rows, [], tmp_path, ExpertOptions(targets=("nope",)), base_id="b")
    with pytest.raises(OptionError, match="no row leaves room"):
        train_expert(model, tokenizer, rows, [], tmp_path, ExpertOptions(max_tokens=8), base_id="b")
    with pytest.raises(OptionError, match="positive"):
        ExpertOptions(rank=0)
    with pytest.raises(OptionError, match="max_steps or max_minutes"):
        LoopOptions(max_steps=None, max_minutes=None)
    wild = ExpertOptions(rate=1e25, step_tokens=128)
    with pytest.raises(DivergedError, match="lower the learning rate"):
        train_expert(model, tokenizer, rows * 20, [], tmp_path / "x", wild, base_id="b")


def test_the_rate_rises_and_ends_at_zero_by_step_or_by_clock():
    options = LoopOptions(max_steps=100, max_minutes=1.0, warmup=0.1, decay=0.5)
    assert options.rate(options.fraction(0, 0.0)) < 0.02
    assert options.rate(options.fraction(10, 0.0)) == 1.0
    assert options.rate(options.fraction(75, 3.0)) == pytest.approx(0.5)
    assert options.rate(options.fraction(3, 45.0)) == pytest.approx(0.5)
    assert options.rate(options.fraction(3, 61.0)) == 0.0


def test_a_checkpoint_of_other_inputs_is_ignored_and_a_damaged_one_refused(tmp_path):
    file = tmp_path / "state.safetensors"
    weight = torch.nn.Parameter(torch.randn(3, 3))
    optimiser = torch.optim.AdamW([weight], lr=0.1)
    weight.sum().backward()
    optimiser.step()
    at = checkpoint.Progress(7, 1.5, 2.0)
    checkpoint.save(file, "inputs", at, {"w": weight}, [optimiser])
    assert checkpoint.load(file, "others", {"w": weight}, [optimiser]) is None
    assert checkpoint.load(tmp_path / "none", "inputs", {"w": weight}, [optimiser]) is None
    fresh = torch.nn.Parameter(torch.zeros(3, 3))
    other = torch.optim.AdamW([fresh], lr=0.1)
    assert checkpoint.load(file, "inputs", {"w": fresh}, [other]) == at
    assert torch.equal(fresh, weight)
    assert torch.equal(other.state[fresh]["exp_avg"], optimiser.state[weight]["exp_avg"])
    with pytest.raises(CheckpointError, match="does not fit"):
        checkpoint.load(file, "inputs", {"w": torch.nn.Parameter(torch.zeros(2))}, [other])
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="delete it"):
        checkpoint.load(file, "inputs", {"w": fresh}, [other])


def test_muon_makes_updates_nearly_orthogonal():
    for shape in ((3, 24, 16), (2, 16, 24)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(*shape, dtype=torch.float64)))
        assert values.min() > 0.3
        assert values.max() < 1.3
    weight = torch.nn.Parameter(torch.randn(8, 5))
    before = weight.detach().clone()
    Muon([weight], lr=0.1).step()
    assert torch.equal(weight, before)
    target = torch.randn(8, 5)
    optimiser = Muon([weight], lr=0.4, weight_decay=0.0)
    for step in range(200):
        optimiser.param_groups[0]["lr"] = 0.4 * (1 - step / 200)
        optimiser.zero_grad()
        (weight - target).square().sum().backward()
        optimiser.step()
    assert (weight - target).abs().mean() < 0.1 * (before - target).abs().mean()
    with pytest.raises(OptionError, match="matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1)
