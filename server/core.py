"""What generates in a process: the base, its experts and sparse models, and the engine over them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loramux.adapters.lora import LoraAdapter
from loramux.adapters.residency import Residency
from loramux.adapters.sparse.model import SparseModel
from loramux.adapters.sparse.options import ReadOptions
from loramux.adapters.sparse.shelf import Shelf
from loramux.adapters.sparse.token_mixtures import TokenMixtures
from loramux.server.engine.grammars import Grammars
from loramux.server.engine.local import LocalEngine
from loramux.server.text.prompts import ChatTokenizer


@dataclass(frozen=True, slots=True)
class Core:
    """As `build.py` makes it.

    Attributes:
        read: takes a directory, an id and options.
        eos_ids: the tokens that end an answer; width: of a row of logits; rows: of the arena.
    """

    base: str
    residency: Residency
    shelf: Shelf
    mixtures: TokenMixtures
    engine: LocalEngine
    tokenizer: ChatTokenizer
    grammars: Grammars
    read: Callable[[Path, str, ReadOptions], LoraAdapter | SparseModel]
    eos_ids: tuple[int, ...]
    width: int
    rows: int
