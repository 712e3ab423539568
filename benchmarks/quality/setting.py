"""A setting of the experiment, from `settings/<name>.toml`: base, budget, what is trained and measured."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

FOLDER = Path(__file__).parent / "settings"

Kind = Literal["pool", "full", "mixlora", "loramoe", "loracoe"]
Base = Literal["plain", "nf4"]
Gating = Literal[
    "base", "single", "average", "random", "oracle", "each",
    "similarity", "classifier", "hybrid", "transformer", "combined", "served", "arrow", "spectr", "sparse",
]  # fmt: skip
#: Those that a router makes, and whether with the fine-tuned classifier in place of the linear one.
ROUTED: dict[str, tuple[str, bool]] = {
    "similarity": ("similarity", False),
    "classifier": ("classifier", False),
    "hybrid": ("hybrid", False),
    "transformer": ("classifier", True),
    "combined": ("hybrid", True),
}
T = TypeVar("T")


class SettingError(SystemExit):
    """A setting cannot be used; the line names file and key."""


@dataclass(frozen=True)
class Model:
    """Something trained on all rows of a seed.

    kind: a pool of `experts` LoRAs on k-means clusters (one expert is a single LoRA on everything), a full
    fine-tune, or a sparse model. base: as it is, or with its linear weights in NF4. rank, alpha, rate: None
    takes the setting's. options: of the training, such as `epochs` (1) or a sparse method's own.
    """

    name: str
    kind: Kind = "pool"
    base: Base = "plain"
    experts: int = 1
    rank: int | None = None
    alpha: float | None = None
    rate: float | None = None
    seeds: tuple[int, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def content(self) -> dict[str, Any]:
        """All that the trained weights depend on."""
        return {key: value for key, value in asdict(self).items() if key != "seeds"}


@dataclass(frozen=True)
class Cell:
    """One row of the table: a trained model, and how it answers.

    gating: who chooses the experts. policy, top_m, merge: as a request would say them. alpha: LoRA alpha at
    test, as the report sweeps it: every weight is multiplied by it over the alpha of the training; None
    changes nothing. exact, choices: whether exact match and the benchmarks are measured too. phase: all seeds
    of an earlier phase come before the first of a later one.
    """

    name: str
    model: str
    gating: Gating
    policy: str = "softmax"
    top_m: int = 3
    merge: str = "exact"
    alpha: float | None = None
    exact: bool = False
    choices: bool = False
    seeds: tuple[int, ...] | None = None
    phase: int = 0

    @property
    def content(self) -> dict[str, Any]:
        """All that its numbers depend on."""
        return {key: value for key, value in asdict(self).items() if key not in ("seeds", "phase")}


@dataclass(frozen=True)
class Claim:
    """A difference that decides something: cell `a` against cell `b`, and the sentence it is about."""

    source: str
    says: str
    a: str
    b: str


@dataclass(frozen=True)
class Setting:
    """Everything a run depends on but the texts.

    tokens: of training, prompts included, for each model; rows are drawn until a domain has its share.
    max_tokens: rows are no longer. rows, choices: test rows of each domain, questions of each benchmark.
    transformer: the encoder that is fine-tuned for gating; None measures no such cell. chat_template: for a
    base that has none. made: base, encoders and texts are made by the run itself (`made.py`), and named by
    their folders there.
    """

    name: str
    about: str
    base: str
    encoder: str
    tokens: int
    max_tokens: int
    step_tokens: int
    rank: int
    alpha: float
    rate: float
    full_rate: float
    rows: int
    seeds: tuple[int, ...]
    models: tuple[Model, ...]
    cells: tuple[Cell, ...]
    claims: tuple[Claim, ...] = ()
    transformer: str | None = None
    transformer_epochs: float = 4.0
    batch_tokens: int = 1024
    choices: int = 0
    max_new: int = 16
    min_rows: int = 4
    domains: tuple[str, ...] | None = None
    chat_template: str | None = None
    made: bool = False

    def inputs(self, model: Model | None, seed: int) -> str:
        """Stands for all that the training rows of a seed, or a model trained on them, depend on here."""
        names = ("encoder", "tokens", "max_tokens", "domains", "chat_template")
        if model is not None:
            names += ("step_tokens", "batch_tokens", "rank", "alpha", "rate", "full_rate", "min_rows")
        content = [{name: getattr(self, name) for name in names}, model and model.content, seed]
        return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]

    def model(self, name: str) -> Model:
        """By name."""
        return next(model for model in self.models if model.name == name)

    def seeds_of(self, cell: Cell) -> tuple[int, ...]:
        """The seeds that a cell is measured with: its own, its model's, or all."""
        return cell.seeds or self.model(cell.model).seeds or self.seeds


def load(name: str) -> Setting:
    """A committed setting by name, or a TOML file.

    Raises:
        SettingError: no such setting, or one that does not fit together.
    """
    file = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise SettingError(f"{file}: {error}") from None
    content["models"] = tuple(
        _made(Model, {"name": key, **one}, file) for key, one in content.get("models", {}).items()
    )
    for key, kind in (("cells", Cell), ("claims", Claim)):
        content[key] = tuple(_made(kind, one, file) for one in content.get(key, ()))
    setting = _made(Setting, content, file)
    _check(setting, file)
    return setting


def _made(kind: type[T], content: Mapping[str, Any], file: Path) -> T:
    known = {one.name for one in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(content) - known):
        raise SettingError(f"{file}: unknown key {unknown[0]!r} of a {kind.__name__.lower()}")
    frozen = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
    try:
        return kind(**frozen)
    except TypeError as error:
        raise SettingError(f"{file}: {error}") from None


def _check(setting: Setting, file: Path) -> None:
    models = {model.name: model for model in setting.models}
    names = [cell.name for cell in setting.cells]
    if twice := _twice(names):
        raise SettingError(f"{file}: two cells are called {twice!r}")
    for model in setting.models:
        if model.kind not in get_args(Kind) or model.base not in get_args(Base):
            raise SettingError(f"{file}: model {model.name}: unknown kind or base")
    for cell in setting.cells:
        if cell.model not in models or cell.gating not in get_args(Gating):
            raise SettingError(f"{file}: cell {cell.name!r}: no such model or gating")
        if cell.gating in ("transformer", "combined") and setting.transformer is None:
            raise SettingError(f"{file}: cell {cell.name!r} needs `transformer`, the encoder to fine-tune")
        if (models[cell.model].kind in ("mixlora", "loramoe", "loracoe")) != (cell.gating == "sparse"):
            raise SettingError(f"{file}: cell {cell.name!r}: gating {cell.gating!r} does not fit its model")
    for claim in setting.claims:
        if missing := [name for name in (claim.a, claim.b) if name not in names]:
            raise SettingError(f"{file}: a claim compares {missing[0]!r}, which is no cell")


def _twice(names: Sequence[str]) -> str | None:
    return next((name for name in names if names.count(name) > 1), None)
