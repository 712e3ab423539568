"""What a pool says about its experts, for people: the manifest's words and the build's measurements."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from loramux.server.pool.build_report import REPORT, BuildReport, ExpertLine
from loramux.server.pool.manifest import ExpertEntry, Pool, PoolError

_REPORT = TypeAdapter(BuildReport)


@dataclass(frozen=True, slots=True)
class ExpertFacts:
    """One expert. Losses are nats per answer token on held-out rows of its own cluster, None where nothing
    was measured; `routed` is the share of those rows whose first choice it is."""

    description: str = ""
    top_terms: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    rows: int = 0
    held_out_rows: int | None = None
    base_loss: float | None = None
    expert_loss: float | None = None
    routed: float | None = None

    @property
    def gain(self) -> float | None:
        """The share of the base's loss that the expert saves; negative where it is worse."""
        if not self.base_loss or self.expert_loss is None:
            return None
        return 1 - self.expert_loss / self.base_loss


def read_facts(pool: Pool) -> dict[str, ExpertFacts]:
    """Facts by the expert's id in the pool; an expert without a line in the report has no measurements.

    Raises:
        PoolError: `report.json` is there and is none.
    """
    file = pool.root / REPORT
    lines: dict[str, ExpertLine] = {}
    if file.is_file():
        try:
            lines = {line.id: line for line in _REPORT.validate_json(file.read_bytes()).experts}
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(str(part) for part in first["loc"]) or "content"
            raise PoolError(f"{file}: {place}: {first['msg']}") from None
    return {entry.id: _facts(entry, lines.get(entry.id)) for entry in pool.manifest.experts}


def _facts(entry: ExpertEntry, line: ExpertLine | None) -> ExpertFacts:
    if line is None:
        return ExpertFacts(entry.description, entry.top_terms, entry.examples, entry.rows)
    return ExpertFacts(
        entry.description,
        entry.top_terms,
        entry.examples,
        entry.rows,
        line.held_out_rows,
        line.base_loss,
        line.expert_loss,
        line.routed,
    )
