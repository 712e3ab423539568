"""An evaluation through the serving engine, against models with the deltas in their weights."""

import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.peft_format import read_lora
from loramux.adapters.training.chat import encode_rows
from loramux.adapters.training.errors import RowError
from loramux.adapters.training.rows import Row
from loramux.router.decision import Candidate, Decision
from loramux.server.cli import app
from loramux.server.errors import StartError
from loramux.server.evaluation import measuring as measuring_module
from loramux.server.evaluation.calibration import Reliability, Roc
from loramux.server.evaluation.evaluate import Options, evaluate
from loramux.server.evaluation.items import AnswerItem, ChoiceItem, read_items
from loramux.server.evaluation.page import page
from loramux.server.evaluation.result import Evaluation
from loramux.server.evaluation.routing import NO_EXPERT, routing_table
from loramux.server.pool.new import NewExpert, NewOptions, new_pool
from loramux.server.settings import load_settings
from tests.pool_kit import BASE, topic_texts, write_adapter, write_base, write_encoder
from tests.tiny import with_delta

TOPICS = ("kitchen", "harbour")


def decision(expert: str | None, score: float = 0.5, probability: float = 0.5) -> Decision:
    best = (Candidate(expert or "e1", 1.0, 0.5, probability, score),)
    chosen = () if expert is None else best
    return Decision("hybrid", "softmax", 1.0, 0.0, best, chosen, expert is None, "", False, 0.5, 0.0)


def test_first_choices_are_counted_by_the_domain_of_the_expert() -> None:
    decisions = {
        "sql": [decision("e1"), decision("e2"), decision("e3"), decision(None)],
        "law": [decision("e3"), decision("e3")],
    }
    table = routing_table("hybrid", decisions, {"e1": "sql", "e2": "sql", "e3": "law"})
    assert table.counts["sql"] == {"sql": 2, "law": 1, NO_EXPERT: 1}
    assert table.accuracy("sql") == 0.5
    assert table.accuracy("law") == 1.0
    assert table.accuracy() == pytest.approx(4 / 6)
    assert table.reliability is not None
    assert table.reliability.ece == pytest.approx(4 / 5 - 0.5)
    assert table.roc is None


def test_calibration_error_and_roc_by_hand() -> None:
    found = Reliability.of([0.95, 0.95, 0.95, 0.95, 0.15], [True, True, True, False, False])
    assert [(one.count, one.right) for one in found.bins] == [(1, 0.0), (4, 0.75)]
    assert found.ece == pytest.approx((4 * 0.2 + 0.15) / 5)
    roc = Roc.of([0.9, 0.8, 0.4], [0.5, 0.4, 0.1], 0.45)
    # Of nine pairs, 0.4 loses to 0.5, and 0.4 against 0.4 is half a pair.
    assert roc.auc == pytest.approx(7.5 / 9)
    assert (roc.lost, roc.caught) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert roc.points[0] == (0.0, 0.0)
    assert roc.points[-1] == (1.0, 1.0)
    area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in zip(roc.points, roc.points[1:], strict=False))
    assert area == pytest.approx(roc.auc)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pool/ with two experts, and data/ with rows of both topics and questions."""
    root = tmp_path_factory.mktemp("evaluated")
    write_base(root / "base")
    write_encoder(root / "encoder")
    experts = [
        NewExpert(topic, write_adapter(root / topic, topic, rank), topic_texts(topic, 30))
        for rank, topic in enumerate(TOPICS, 3)
    ]
    options = NewOptions(str(root / "base"), BASE, copy_base=False, encoder=str(root / "encoder"))
    new_pool(root / "pool", experts, options)
    (root / "data").mkdir()
    for topic in TOPICS:
        rows = [
            {"instruction": text, "output": f"about {topic} {number}"}
            for number, text in enumerate(topic_texts(topic, 4, seed=7))
        ]
        (root / "data" / f"{topic}.test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    questions = [
        {"prompt": "Question: what floats?", "choices": ["a hull", "an oven of stone"], "answer": 0},
        {"prompts": ["The oven is", "The rudder is"], "continuation": "hot", "answer": 1},
    ]
    (root / "data" / "quiz.test.jsonl").write_text("\n".join(map(json.dumps, questions)))
    garden = [json.dumps({"instruction": text, "output": ""}) for text in topic_texts("garden", 6)]
    (root / "foreign.jsonl").write_text("\n".join(garden))
    return root


def measured(parts: Path, **options: object) -> Evaluation:
    settings = load_settings(None, {"pool": parts / "pool", "device": "cpu", "dtype": "float32"})
    chosen = {"data": (parts / "data",), "foreign": (parts / "foreign.jsonl",), "top_m": (1, 2), **options}
    return evaluate(settings, Options(**chosen))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(parts: Path) -> Evaluation:
    return measured(parts)


def test_losses_and_choices_are_those_of_models_with_the_deltas_in_their_weights(
    parts: Path, whole: Evaluation
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(parts / "base")
    base = AutoModelForCausalLM.from_pretrained(parts / "base", dtype=torch.float32).eval()
    shapes = BaseShapes.from_model(base, BASE)
    models = {"base": base}
    for topic in TOPICS:
        adapter = read_lora(parts / "pool/experts" / topic, id=topic, base=shapes)
        models[topic] = with_delta(base, [(adapter, 1.0)])
    items = read_items([parts / "data"])

    @torch.inference_mode()
    def nats(model: torch.nn.Module, ids: tuple[int, ...], start: int) -> float:
        logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return -sum(float(logprobs[i - 1, ids[i]]) for i in range(start, len(ids)))

    for name, model in models.items():
        for topic in TOPICS:
            rows = [item.row for item in items[topic] if isinstance(item, AnswerItem)]
            encoded = encode_rows(tokenizer, rows, 512)
            tokens = sum(len(row) - row.answer_start for row in encoded)
            expected = sum(nats(model, row.ids, row.answer_start) for row in encoded) / tokens
            score = whole.scores[name][topic]
            assert (score.rows, score.tokens) == (4, tokens)
            assert score.loss == pytest.approx(expected, rel=1e-4)
            assert score.exact == 0.0  # a random model answers nothing word for word
            assert (score.acc, score.acc_norm) == (None, None)
        right = []
        for item in items["quiz"]:
            assert isinstance(item, ChoiceItem)
            costs = []
            for context, continuation in zip(item.contexts, item.continuations, strict=True):
                start = len(tokenizer(context)["input_ids"])
                costs.append(nats(model, tuple(tokenizer(context + continuation)["input_ids"]), start))
            right.append(costs.index(min(costs)) == item.answer)
        assert whole.scores[name]["quiz"].acc == sum(right) / 2
        assert whole.scores[name]["quiz"].loss is None


def test_the_oracle_and_the_share_of_its_gain(whole: Evaluation) -> None:
    for topic in TOPICS:
        losses = {name: whole.value(name, topic, "loss") for name in TOPICS}
        best = min(losses, key=lambda name: losses[name] or 0.0)
        assert whole.oracle(topic, "loss") == (best, losses[best])
    tokens = {topic: whole.scores["base"][topic].tokens for topic in TOPICS}

    def total(name: str | None) -> float:
        """Nats under a system, or under the best expert of each domain."""
        best = {topic: (whole.oracle(topic, "loss") or ("", 0.0))[1] for topic in TOPICS}
        values = best if name is None else {topic: whole.value(name, topic, "loss") for topic in TOPICS}
        return sum(tokens[topic] * (value or 0.0) for topic, value in values.items())

    possible = total("base") - total(None)
    expected = (total("base") - total("hybrid top 1")) / possible if possible > 0 else None
    assert whole.gain_share("hybrid top 1") == (None if expected is None else pytest.approx(expected))
    assert whole.gain_share("base") in (None, 0.0)


def test_systems_routing_and_calibration_are_all_there(whole: Evaluation) -> None:
    assert [system.name for system in whole.systems] == [
        "base", "harbour", "kitchen", "similarity top 1", "similarity top 2", "classifier top 1",
        "classifier top 2", "hybrid top 1", "hybrid top 2", "arrow top 1", "arrow top 2", "spectr top 1",
        "spectr top 2", "logo top 1", "logo top 2",
    ]  # fmt: skip
    assert whole.experts == {"kitchen": "kitchen", "harbour": "harbour"}
    table = whole.routing["hybrid"]
    assert set(table.counts) == {"harbour", "kitchen", "quiz"}
    assert table.roc is not None
    assert table.roc.auc > 0.5
    assert table.reliability is not None


def test_it_is_json_and_a_page_that_needs_nothing_else(whole: Evaluation) -> None:
    text = json.dumps(whole.json(), allow_nan=False)
    assert json.loads(text)["scores"]["base"]["quiz"]["acc"] == whole.scores["base"]["quiz"].acc
    html = page(whole)
    assert not re.search(r"(?:src|href)=|<script|url\(", html)
    plots = re.findall(r"<svg.*?</svg>", html)
    assert len(plots) >= 8  # three strategies with two curves each, and bars
    for plot in plots:
        ElementTree.fromstring(plot)  # noqa: S314 - written here
    for domain in whole.domains:
        assert f"<td>{domain}</td>" in html


def test_a_killed_run_goes_on_and_measures_nothing_twice(
    parts: Path, whole: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = measuring_module.Measuring._score, []

    async def dying(self: object, item: object, adapter: object) -> object:
        calls.append(item)
        if len(calls) == 6:
            raise RuntimeError("killed")
        return await real(self, item, adapter)  # type: ignore[arg-type]

    ledger = tmp_path / "out.json.rows"
    monkeypatch.setattr(measuring_module.Measuring, "_score", dying)
    with pytest.raises(RuntimeError, match="killed"):
        measured(parts, ledger=ledger)
    kept = len(ledger.read_text().splitlines()) - 1
    with ledger.open("a") as file:
        file.write('{"key": ["torn')
    calls.clear()

    async def counting(self: object, item: object, adapter: object) -> object:
        calls.append(item)
        return await real(self, item, adapter)  # type: ignore[arg-type]

    monkeypatch.setattr(measuring_module.Measuring, "_score", counting)
    again = measured(parts, ledger=ledger)
    for system, row in again.scores.items():
        for domain, score in row.items():
            # Other rows share a step now, which changes the last bits.
            assert score.nats == pytest.approx(whole.scores[system][domain].nats, rel=1e-5)
            assert score.acc == whole.scores[system][domain].acc
    everything = len(ledger.read_text().splitlines()) - 1
    assert len(calls) == everything - kept
    calls.clear()
    assert measured(parts, ledger=ledger).scores == again.scores
    assert not calls
    assert measured(parts, ledger=ledger, max_new=0).scores["base"]["harbour"].exact is None
    assert len(calls) == everything


def test_the_command_prints_and_writes(parts: Path, tmp_path: Path) -> None:
    arguments = ["evaluate", "--pool", str(parts / "pool"), "--data", str(parts / "data"), "--limit", "2"]
    arguments += ["--only", "base", "--only", "hybrid top 1", "--out", str(tmp_path / "e.json")]
    result = CliRunner().invoke(app, [*arguments, "--html", str(tmp_path / "e.html")], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert "Nats per answer token" in result.output
    assert "acc_norm" in result.output
    content = json.loads((tmp_path / "e.json").read_text())
    assert list(content["scores"]) == ["base", "hybrid top 1"]
    assert (tmp_path / "e.html").read_text().startswith("<!doctype html>")


def test_the_routing_alone_needs_no_base(parts: Path, tmp_path: Path) -> None:
    pool = Path(shutil.copytree(parts / "pool", tmp_path / "pool"))
    manifest = json.loads((pool / "pool.json").read_text())
    manifest["base"]["path"] = str(tmp_path / "nowhere")
    (pool / "pool.json").write_text(json.dumps(manifest))
    result = CliRunner().invoke(
        app, ["evaluate", "--pool", str(pool), "--data", str(parts / "data"), "--routing-only"]
    )
    assert result.exit_code == 0, result.output
    assert "right domain first" in result.output


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"prompt": "x", "choices": ["a"], "answer": 0}', '"choices" must be a list of two'),
        ('{"prompt": "x", "choices": ["a", "b"], "answer": 2}', '"answer" must be the number of a choice'),
        ('{"prompt": "x", "choices": ["a", "b"], "answer": true}', '"answer" must be the number of a choice'),
        ('{"prompt": "", "choices": ["a", "b"], "answer": 0}', '"prompt" must be a text'),
        ('{"prompts": ["x", "y"], "answer": 0}', '"continuation" must be a text'),
        ('{"instruction": 3, "output": "x"}', '"instruction" must be a string'),
        ("{", "not JSON"),
    ],
)
def test_a_line_that_is_no_item_is_named(tmp_path: Path, line: str, why: str) -> None:
    file = tmp_path / "x.test.jsonl"
    file.write_text('{"instruction": "a", "output": "b"}\n' + line)
    with pytest.raises((StartError, RowError), match=re.escape(f"{file}:2: {why}")) as caught:
        read_items([file])
    assert "\n" not in str(caught.value)


def test_items_are_drawn_by_seed_and_questions_end_in_answer(tmp_path: Path) -> None:
    rows = [json.dumps({"instruction": f"row {number}", "output": "x"}) for number in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    first, again = (read_items([tmp_path], limit=5, seed=1)["a"] for _ in range(2))
    assert first == again
    assert first != read_items([tmp_path], limit=5, seed=2)["a"]
    (tmp_path / "b.jsonl").write_text(
        '{"prompt": "Passage: p\\nQuestion: q\\n", "choices": ["no", "yes"], "answer": 1, "domain": "boolq"}'
    )
    [item] = read_items([tmp_path / "b.jsonl"])["boolq"]
    assert isinstance(item, ChoiceItem)
    assert item.contexts == ("Passage: p\nQuestion: q\nAnswer:",) * 2
    assert item.continuations == (" no", " yes")
    assert item.sizes == (2, 3)
    with pytest.raises(StartError, match="no such file"):
        read_items([tmp_path / "nowhere"])


def test_only_names_what_there_is(parts: Path) -> None:
    with pytest.raises(StartError, match=r"--only 'kitchens' is none of .*asking, base, .*experts.*routed"):
        measured(parts, only=("kitchens",))


def test_rows_are_identified_by_their_content() -> None:
    one, other = (AnswerItem("x", Row("a", "", text)) for text in ("b", "c"))
    assert one.id != other.id
    assert one.id == AnswerItem("y", Row("a", "", "b")).id
