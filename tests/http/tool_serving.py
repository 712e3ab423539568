"""A server whose engine says what it is told and whose chat template knows tools."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel

from tests.http.serving import Served, serving
from tests.kit import ScriptedEngine
from tests.tool_kit import HERMES, Speaker


@contextmanager
def serving_tools(root: Path, speaker: Speaker) -> Iterator[Served]:
    limits = {"max_tools": 4, "max_grammar_bytes": 4096}
    engine = ScriptedEngine(speaker, max_context=4096)
    with serving(root, engine=engine, tokenizer=HERMES, limits=limits) as running:
        yield running


class Weather(BaseModel):
    """Asks for the weather."""

    city: str
    days: int
