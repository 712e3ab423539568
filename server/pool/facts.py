"""What a pool says about its experts, for people: the manifest's words and the build's measurements."""

from dataclasses import dataclass

from loramux.server.pool.build_report import ReadLine, read_lines
from loramux.server.pool.manifest import Pool

NOTHING = ReadLine("")


@dataclass(frozen=True, slots=True)
class ExpertFacts:
    """One expert: its words, the rows of its cluster, and the line of the report, empty without one."""

    description: str = ""
    top_terms: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    rows: int = 0
    measured: ReadLine = NOTHING


def read_facts(pool: Pool) -> dict[str, ExpertFacts]:
    """Facts by the expert's id in the pool.

    Raises:
        PoolError: `report.json` is not what a build writes.
    """
    lines = read_lines(pool)
    return {
        entry.id: ExpertFacts(
            entry.description, entry.top_terms, entry.examples, entry.rows, lines.get(entry.id, NOTHING)
        )
        for entry in pool.manifest.experts
    }
