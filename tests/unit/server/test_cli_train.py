"""`loramux train base` and `loramux train expert`, through the real command line."""

import json

import pytest
from typer.testing import CliRunner

from loramux.adapters.training.errors import OptionError, RowError
from loramux.server.cli.train import app
from loramux.server.errors import StartError

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"instruction": f"say {n}", "output": f"{n} and {n}"} for n in range(60)]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def base(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "base"
    shape = ["--hidden", 32, "--layers", 1, "--heads", 2, "--kv-heads", 1, "--ffn", 48, "--vocabulary", 280]
    result = run("base", "--data", data, "--out", out, "--steps", 2, *shape)
    assert result.exit_code == 0
    assert "2 steps" in result.output
    return out


def test_an_expert_is_trained_from_the_command_line(base, data, tmp_path):
    out = tmp_path / "counting"
    options = ["--epochs", 0.5, "--rank", 2, "--held-out", 0.2, "--target", "q_proj", "--target", "v_proj"]
    result = run("expert", "--data", data, "--out", out, "--base", base, "--base-id", "tiny", *options)
    assert result.exit_code == 0
    assert "->" in result.output
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["target_modules"]) == (2, ["q_proj", "v_proj"])
    assert config["base_model_name_or_path"] == "tiny"


def test_what_is_wrong_is_said_in_one_line(base, data, tmp_path):
    common = ("expert", "--data", data, "--out", tmp_path / "x")
    with pytest.raises(StartError, match="tokenizer of base") as caught:
        run(*common, "--base", tmp_path / "nowhere")
    assert "\n" not in str(caught.value)
    with pytest.raises(StartError, match="choose none, nf4 or auto"):
        run(*common, "--base", base, "--quantization", "int3")
    with pytest.raises(OptionError, match="no module called w9"):
        run(*common, "--base", base, "--target", "w9")
    with pytest.raises(RowError, match="no such file"):
        run("expert", "--data", tmp_path / "none", "--out", tmp_path / "x", "--base", base)
    with pytest.raises(OptionError, match="max_steps or max_minutes"):
        run("base", "--data", data, "--out", tmp_path / "y", "--vocabulary", 280)


SHORT = ("--steps", 2, "--rank", 2, "--step-tokens", 128, "--held-out", 0.2, "--base-id", "tiny")


@pytest.mark.parametrize(
    ("command", "options", "expected"),
    [
        ("lora", ["--dropout", 0.1], {"peft_type": "LORA", "lora_dropout": 0.1, "use_dora": False}),
        ("dora", ["--target", "q_proj"], {"peft_type": "LORA", "use_dora": True}),
        (
            "mixlora",
            ["--experts", 3, "--top-k", 3],
            {"peft_type": "MIXLORA", "routing_strategy": "mixlora", "num_experts": 3, "top_k": 3, "r": 2},
        ),
        (
            "mixlora",
            ["--strategy", "switch", "--capacity", 7],
            {"routing_strategy": "mixlora-switch", "expert_capacity": 7, "lora_dropout": 0.05},
        ),
        (
            "loracoe",
            ["--gate-gain", 1.5, "--experts", 3],
            {"peft_type": "LORACOE", "gate_gain": 1.5, "num_experts": 3, "phase": "joint"},
        ),
        ("loramoe", ["--alpha", 8], {"peft_type": "LORAMOE", "num_experts": 6, "r": 2, "lora_alpha": 8}),
    ],
)
def test_adapters_of_every_method_are_trained_from_the_command_line(
    base, data, tmp_path, command, options, expected
):
    out = tmp_path / "model"
    result = run(command, "--data", data, "--out", out, "--base", base, *SHORT, *options)
    assert result.exit_code == 0
    assert "2 steps" in result.output
    assert "->" in result.output
    config = json.loads((out / "adapter_config.json").read_text())
    assert {key: config[key] for key in expected} == expected
    assert config["base_model_name_or_path"] == "tiny"
    assert (out / "adapter_model.safetensors").is_file()


def test_options_of_mixtures_that_cannot_be_met_are_named(base, data, tmp_path):
    common = ("--data", data, "--out", tmp_path / "x", "--base", base, *SHORT)
    with pytest.raises(OptionError, match="top_k or switch, got 'dense'"):
        run("mixlora", *common, "--strategy", "dense")
    with pytest.raises(OptionError, match="--gate-gain must be rank, none or a number, got 'much'"):
        run("loracoe", *common, "--gate-gain", "much")
    with pytest.raises(OptionError, match="no module called q_proj"):
        run("loramoe", *common, "--target", "q_proj")


def test_commands_share_their_options_but_keep_their_own_defaults():
    shown = {name: run(name, "--help").output for name in ("lora", "mixlora", "loracoe", "loramoe")}
    assert all("--held-out-rows" in text and "--quantization" in text for text in shown.values())
    assert "--joint-rate" in shown["loracoe"]
    assert "--joint-rate" not in shown["lora"]
