"""`loramux convert`: adapter files from a pickle to safetensors or back, from old key layouts to the new."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Layout(StrEnum):
    """Layouts of MixLoRA's keys that are written."""

    THREE = "3"


def convert(
    folder: Annotated[Path, typer.Argument(help="Adapter directory.")],
    out: Annotated[
        Path | None, typer.Option(help="Directory to write; unset: the other file is added to FOLDER.")
    ] = None,
    layout: Annotated[
        Layout | None, typer.Option(help="Rename the keys of MixLoRA layouts 1 and 2 to those of 3.")
    ] = None,
    to_bin: Annotated[
        bool, typer.Option("--to-bin", help="Write adapter_model.bin, for upstream programs.")
    ] = False,
) -> None:
    """Make adapter_model.safetensors of an adapter_model.bin, without running anything in it.

    Example: loramux convert adapters/poetry
    """
    from loramux.adapters.sparse.convert import convert as convert_files

    done = convert_files(folder, out, layout=None if layout is None else int(layout), to_bin=to_bin)
    renamed = f", {done.renamed} renamed" if done.renamed else ""
    typer.echo(f"{done.path}: {done.tensors} tensors{renamed}")
