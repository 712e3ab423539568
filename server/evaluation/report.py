"""The evaluation of a pool: its two tables, for people and as JSON."""

import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.blend import Blend
from loramux.adapters.lora import LoraAdapter
from loramux.adapters.training.chat import encode_rows
from loramux.adapters.training.rows import Row, read_rows
from loramux.router.decision import STRATEGIES, Decision
from loramux.router.store import load_router
from loramux.server.base_files import BaseFiles
from loramux.server.engine.model import load_base
from loramux.server.errors import StartError
from loramux.server.evaluation.losses import DomainLoss, Losses
from loramux.server.evaluation.routing import (
    NO_EXPERT,
    RoutingTable,
    decide_all,
    expert_domains,
    routing_table,
)
from loramux.server.pool.experts import read_experts
from loramux.server.pool.manifest import read_pool

MAX_TOKENS = 512
SERVED = "hybrid"


@dataclass(frozen=True)
class Evaluation:
    """`tables` has one entry a strategy; `losses` one a domain, for the blends of the strategy that is
    served."""

    domains: Mapping[str, str]
    tables: Mapping[str, RoutingTable]
    losses: Mapping[str, DomainLoss]

    @property
    def mean_excess(self) -> float:
        """How much more the blend costs than the best single expert of each domain, mean over domains."""
        return sum(loss.excess for loss in self.losses.values()) / max(1, len(self.losses))

    def json(self) -> dict[str, Any]:
        """Everything as plain JSON types."""
        return {
            "experts": dict(self.domains),
            "routing": {
                name: {"accuracy": table.accuracy(), "counts": {d: dict(c) for d, c in table.counts.items()}}
                for name, table in self.tables.items()
            },
            "losses": {domain: asdict(loss) for domain, loss in self.losses.items()},
            "mean_excess": self.mean_excess,
        }


def evaluate(
    pool_dir: Path,
    data: Path,
    *,
    loss_rows: int = 60,
    seed: int = 0,
    weight_step: float = 0.01,
    progress: Callable[[str], None] = lambda _: None,
) -> Evaluation:
    """Measure a pool on `<domain>.test.jsonl` files; `<domain>.train.jsonl` files name the experts' domains.

    Args:
        pool_dir: the pool.
        data: folder of the files. Without train files, the test files name the domains.
        loss_rows: rows of each domain whose losses are measured; 0 measures the routing only.
        seed: of their choice.
        weight_step: grid of the blend weights, as in the server.
        progress: told what is about to be done.

    Raises:
        StartError, RowError, RouterError, AdapterError: what is wrong with the pool or the data.
    """
    tests = _by_domain(data, ".test.jsonl")
    if not tests:
        raise StartError(f"{data}: no <domain>.test.jsonl file; name each held-out file after its domain")
    pool = read_pool(pool_dir)
    router = load_router(pool.router_dir, experts=[entry.id for entry in pool.manifest.experts])
    progress("which domain fills which cluster")
    domains = expert_domains(router, _by_domain(data, ".train.jsonl") or tests)
    tables: dict[str, RoutingTable] = {}
    served: Mapping[str, list[Decision]] = {}
    for strategy in STRATEGIES:
        progress(f"routing by {strategy}")
        decisions = decide_all(router, tests, strategy)
        tables[strategy] = routing_table(strategy, decisions, domains)
        served = decisions if strategy == SERVED else served
    losses: dict[str, DomainLoss] = {}
    if loss_rows:
        base = BaseFiles.locate(pool.base_location, content=pool.base_content)
        model = load_base(base.folder, device="cpu")
        tokenizer = AutoTokenizer.from_pretrained(base.folder, local_files_only=True)
        experts = read_experts(pool, BaseShapes.from_model(model, pool.manifest.base.id))
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        measure = Losses(model, experts, pad)
        for domain, rows in tests.items():
            progress(f"losses on {domain}")
            picked = random.Random(seed).sample(range(len(rows)), min(loss_rows, len(rows)))
            encoded = encode_rows(tokenizer, [rows[i] for i in picked], MAX_TOKENS)
            blends = [_blend(served[domain][i], experts, weight_step) for i in picked]
            losses[domain] = measure.domain(encoded, blends)
    return Evaluation(domains, tables, losses)


def _by_domain(data: Path, suffix: str) -> dict[str, list[Row]]:
    return {file.name.removesuffix(suffix): read_rows([file]) for file in sorted(data.glob(f"*{suffix}"))}


def _blend(decision: Decision, experts: Mapping[str, LoraAdapter], step: float) -> Blend:
    return Blend.of([(e.id, experts[e.id].content_hash, e.weight) for e in decision.experts], grid=step)


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """Both tables."""
    for name, domain in sorted(evaluation.domains.items(), key=lambda item: item[1]):
        console.print(f"expert {name}: {domain}")
    table = evaluation.tables[SERVED]
    columns = sorted({column for row in table.counts.values() for column in row} | set(table.counts))
    columns = [c for c in columns if c != NO_EXPERT] + [NO_EXPERT]
    confusion = Table(title=f"First choice, {SERVED}: rows are prompts, columns the expert's domain")
    for heading in ["domain", *columns, "right"]:
        confusion.add_column(heading, justify="left" if heading == "domain" else "right")
    for domain, row in table.counts.items():
        confusion.add_row(
            domain, *(str(row.get(column, 0) or "·") for column in columns), f"{table.accuracy(domain):.1%}"
        )
    console.print(confusion)
    accuracies = (f"{name} {table.accuracy():.1%}" for name, table in evaluation.tables.items())
    console.print(f"right domain first: {', '.join(accuracies)}")
    if not evaluation.losses:
        return
    costs = Table(title="Nats per answer token")
    for heading in ("domain", "rows", "base", "blend", "best expert", "its id", "blend over best"):
        costs.add_column(heading, justify="left" if heading in ("domain", "its id") else "right")
    for domain, loss in evaluation.losses.items():
        numbers = (f"{loss.base:.3f}", f"{loss.blend:.3f}", f"{loss.best:.3f}")
        costs.add_row(domain, str(loss.rows), *numbers, loss.best_expert, f"{loss.excess:+.1%}")
    console.print(costs)
    worse = [domain for domain, loss in evaluation.losses.items() if loss.blend >= loss.base]
    console.print(
        f"blend over best single expert, mean over domains: {evaluation.mean_excess:+.2%}; "
        f"blend below base on {'every domain' if not worse else 'all domains but ' + ', '.join(worse)}"
    )
