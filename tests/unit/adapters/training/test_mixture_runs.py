"""Training sparse models from rows to files: they learn, can be killed, and say from files what they said."""

import dataclasses
import json
import random

import pytest
import torch
from safetensors.torch import load_file

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.sparse.model import FfnStrategy
from loramux.adapters.sparse.read import read_sparse
from loramux.adapters.training import loop
from loramux.adapters.training.base import BaseOptions, train_base
from loramux.adapters.training.chat import encode_rows
from loramux.adapters.training.errors import DivergedError, OptionError
from loramux.adapters.training.evaluate import loss_per_token
from loramux.adapters.training.expert import ExpertOptions, train_expert
from loramux.adapters.training.loop import LoopOptions
from loramux.adapters.training.loracoe import LoraCoeOptions
from loramux.adapters.training.loramoe import LoraMoeOptions
from loramux.adapters.training.mixlora import MixLoraOptions
from loramux.adapters.training.mixture import train_mixture
from loramux.adapters.training.rows import Row
from loramux.server.pool.training_base import load_training_base
from tests.unit.adapters.training.scripts import scripted

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

SHORT = {"rank": 2, "alpha": 4, "rate": 1e-2, "steps": 10, "step_tokens": 256, "batch_tokens": 128}
OPTIONS = {
    "mixlora": MixLoraOptions(**SHORT, experts=4),
    "switch": MixLoraOptions(
        **SHORT, experts=4, strategy=FfnStrategy.SWITCH, router_init=0.02, balance_weight=0.0, dropout=0.0
    ),
    "loracoe": LoraCoeOptions(**SHORT, joint_rate=1e-2),
    "loramoe": LoraMoeOptions(**SHORT, experts=3, balance_weight=0.01),
}


def rows_of(kind, count):
    rng = random.Random(kind)
    names = ["ann", "bob", "cat", "dan"]
    return [
        Row(f"{kind}: what does {rng.choice(names)} say, {i}?", "", f"{kind} {kind} yes")
        for i in range(count)
    ]


ROWS = rows_of("moo", 40) + rows_of("oink", 40)
UNSEEN = rows_of("moo", 50)[40:] + rows_of("oink", 50)[40:]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    data = folder / "rows.jsonl"
    data.write_text("\n".join(json.dumps(dataclasses.asdict(row)) for row in ROWS))
    shape = BaseOptions(
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
    )
    train_base([data], folder / "base", shape, max_steps=8)
    return folder / "base"


@pytest.fixture
def opened(base):
    return load_training_base(str(base), device="cpu")


@pytest.mark.parametrize("name", OPTIONS)
def test_a_short_run_lowers_the_held_out_loss_and_its_files_say_the_same(name, base, opened, tmp_path):
    model, tokenizer = opened
    before = {key: value.clone() for key, value in model.named_parameters() if "layers" not in key}
    out = tmp_path / "model"
    report = train_mixture(model, tokenizer, ROWS, UNSEEN, out, OPTIONS[name], base_id="tiny")
    assert report.loss < report.base_loss - 0.05
    assert (report.rows, report.held_out_rows, report.steps) == (80, 20, 10)
    assert all(torch.equal(before[key], dict(model.named_parameters())[key]) for key in before)
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    tensors = load_file(out / "adapter_model.safetensors")
    assert sum(value.numel() for value in tensors.values()) == report.parameters
    routers = [value for key, value in tensors.items() if "router" in key or "gate.weight" in key]
    assert {value.dtype for value in routers} == {torch.float32}
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"

    read = read_sparse(out, id="m", base=BaseShapes.from_config_dir(base, "tiny"))
    again = scripted(model, read)
    measured = loss_per_token(again, encode_rows(tokenizer, UNSEEN, 512), pad_id=tokenizer.pad_token_id)
    assert measured == pytest.approx(report.loss, rel=1e-4)


def test_a_finished_run_is_not_repeated_and_the_same_seed_gives_the_same_model(opened, tmp_path, monkeypatch):
    model, tokenizer = opened
    options = OPTIONS["mixlora"]
    one = train_mixture(model, tokenizer, ROWS, UNSEEN, tmp_path / "one", options, base_id="b")
    calls = []
    real = loop.token_losses
    monkeypatch.setattr(loop, "token_losses", lambda *a: calls.append(1) or real(*a))
    assert train_mixture(model, tokenizer, ROWS, UNSEEN, tmp_path / "one", options, base_id="b") == one
    assert not calls
    torch.rand(3)
    train_mixture(model, tokenizer, ROWS, UNSEEN, tmp_path / "two", options, base_id="b")
    assert calls
    other = dataclasses.replace(options, seed=1)
    train_mixture(model, tokenizer, ROWS, UNSEEN, tmp_path / "three", other, base_id="b")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two", "three")]
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    assert not all(torch.equal(files[0][key], files[2][key]) for key in files[0])


@pytest.mark.parametrize(("name", "died"), [("mixlora", 4), ("loracoe", 3), ("loracoe", 8)])
def test_a_killed_run_goes_on_where_it_was_in_either_phase(name, died, opened, tmp_path, monkeypatch):
    """With dropout: what a step draws depends on its number alone."""
    model, tokenizer = opened
    options = dataclasses.replace(OPTIONS[name], dropout=0.2)
    arguments = (model, tokenizer, ROWS, UNSEEN)
    whole = train_mixture(*arguments, tmp_path / "whole", options, base_id="b")
    steps_done = []
    real = loop._step

    def die_later(*step):
        if len(steps_done) == died:
            raise KeyboardInterrupt
        steps_done.append(1)
        return real(*step)

    def every_step(max_steps, max_minutes, **_):
        return LoopOptions(max_steps=max_steps, max_minutes=max_minutes, checkpoint_minutes=0)

    monkeypatch.setattr("loramux.adapters.training.run.LoopOptions", every_step)
    monkeypatch.setattr(loop, "_step", die_later)
    with pytest.raises(KeyboardInterrupt):
        train_mixture(*arguments, tmp_path / "cut", options, base_id="b")
    assert not (tmp_path / "cut").exists()
    monkeypatch.setattr(loop, "_step", lambda *step: steps_done.append(1) or real(*step))
    resumed = train_mixture(*arguments, tmp_path / "cut", options, base_id="b")
    assert len(steps_done) == whole.steps
    assert resumed == whole
    one, two = (load_file(tmp_path / path / "adapter_model.safetensors") for path in ("whole", "cut"))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("gain", ["rank", "none", 3.0])
def test_loracoe_leaves_its_warm_up_as_a_checkpoint_that_says_the_same(gain, base, opened, tmp_path):
    model, tokenizer = opened
    options = dataclasses.replace(OPTIONS["loracoe"], gate_gain=gain)
    report = train_mixture(model, tokenizer, ROWS, UNSEEN, tmp_path / "m", options, base_id="tiny")
    assert report.warmup_loss < report.base_loss
    warmup = tmp_path / "m.work" / "warmup"
    config = json.loads((warmup / "adapter_config.json").read_text())
    assert (config["phase"], config["peft_type"]) == ("warmup", "LORACOE")
    tensors = load_file(warmup / "adapter_model.safetensors")
    assert {key.rpartition(".lora_")[2] for key in tensors} == {"A.weight", "B.weight"}
    joint = json.loads((tmp_path / "m" / "adapter_config.json").read_text())
    assert (joint["phase"], joint["gate_gain"]) == ("joint", gain)
    read = read_sparse(warmup, id="w", base=BaseShapes.from_config_dir(base, "tiny"))
    unseen = encode_rows(tokenizer, UNSEEN, 512)
    measured = loss_per_token(scripted(model, read), unseen, pad_id=tokenizer.pad_token_id)
    assert measured == pytest.approx(report.warmup_loss, rel=1e-3)


def test_the_joint_phase_once_saw_the_same_rows_again(opened, tmp_path, monkeypatch):
    model, tokenizer = opened
    seen = []
    real = loop.token_losses
    monkeypatch.setattr(loop, "token_losses", lambda m, batch: seen.append(batch.ids) or real(m, batch))
    options = dataclasses.replace(OPTIONS["loracoe"], steps=4)
    train_mixture(model, tokenizer, ROWS, [], tmp_path / "coe", options, base_id="b")
    two_phases, seen[:] = list(seen), []
    options = dataclasses.replace(OPTIONS["loramoe"], steps=4)
    train_mixture(model, tokenizer, ROWS, [], tmp_path / "moe", options, base_id="b")
    assert len(two_phases) == len(seen)
    assert all(torch.equal(one, other) for one, other in zip(two_phases, seen, strict=True))


def test_a_sparse_model_trains_on_a_4_bit_base(base, tmp_path):
    model, tokenizer = load_training_base(str(base), quantization="nf4", device="cpu")
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    report = train_mixture(model, tokenizer, ROWS, UNSEEN, tmp_path / "m", OPTIONS["mixlora"], base_id="tiny")
    assert report.loss < report.base_loss - 0.1


def test_what_cannot_be_trained_is_refused_and_the_base_is_whole_again(opened, tmp_path):
    model, tokenizer = opened
    modules = {name: type(module).__name__ for name, module in model.named_modules()}
    common = (model, tokenizer, ROWS, [], tmp_path / "x")
    with pytest.raises(OptionError, match="no module called q_proj"):
        train_mixture(*common, LoraMoeOptions(targets=("q_proj",)), base_id="b")
    with pytest.raises(OptionError, match="leaves room"):
        train_mixture(*common, MixLoraOptions(max_tokens=8), base_id="b")
    wild = dataclasses.replace(OPTIONS["loracoe"], rate=1e25)
    with pytest.raises(DivergedError, match="lower the learning rate"):
        train_mixture(*common, wild, base_id="b")
    assert not (tmp_path / "x").exists()
    after = {name: type(module).__name__ for name, module in model.named_modules()}
    assert {n: t for n, t in after.items() if t != "Linear"} == {
        n: t for n, t in modules.items() if t not in ("Linear", "PackedLinear")
    }


def test_a_dora_is_trained_by_peft_with_magnitudes(opened, tmp_path):
    model, tokenizer = opened
    options = ExpertOptions(**SHORT, dora=True, dropout=0.1)
    report = train_expert(model, tokenizer, ROWS, UNSEEN, tmp_path / "dora", options, base_id="b")
    assert report.expert_loss < report.base_loss - 0.1
    tensors = load_file(tmp_path / "dora" / "adapter_model.safetensors")
    assert len([key for key in tensors if "magnitude" in key]) == 14
    assert json.loads((tmp_path / "dora" / "adapter_config.json").read_text())["use_dora"] is True


def test_computing_in_bfloat16_is_another_run_that_learns_as_much(base, tmp_path):
    options, said = OPTIONS["mixlora"], []
    losses = {}
    for dtype in ("float32", "bfloat16"):
        model, tokenizer = load_training_base(str(base), device="cpu", dtype=dtype, say=said.append)
        report = train_mixture(model, tokenizer, ROWS, UNSEEN, tmp_path / "one", options, base_id="b")
        assert report.loss < report.base_loss - 0.05
        losses[dtype] = report.loss
        assert said[-1] == f"training computes in {dtype}: as asked"
    assert losses["float32"] != losses["bfloat16"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], abs=0.02)
