"""The option that every command which reads rows has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Rows = Annotated[
    list[Path],
    typer.Option(
        help="JSONL file, or a folder of them (*.train.jsonl only, where there are such). Repeatable."
    ),
]
