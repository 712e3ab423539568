"""Reading `router.json` strictly: every key known, every value typed, every error naming file and field."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from .decision import STRATEGIES, Strategy
from .encoder import EncoderSpec
from .encoder_files import read_json
from .encoder_place import Package
from .errors import RouterFileError
from .state import Calibration

# What is written has the lowest version that can say it, so that older releases read it too.
FORMAT, VERSION, NEWEST_VERSION = "loramux-router", 2, 3
T = TypeVar("T")
_KEYS = ("format", "version", "experts", "encoder", "classifier", "calibration", "hybrid_weight", "centring")
_KEYS_OF = {1: _KEYS, 2: (*_KEYS, "familiarity"), 3: (*_KEYS, "familiarity")}
_ENCODER_KEYS = (*(field.name for field in fields(EncoderSpec)), "path")


@dataclass(frozen=True, slots=True)
class Header:
    """The content of `router.json`. `classifier` is its kind or None; paths are relative to the directory.

    `encoder_package` is the installed package that brings the encoder (from version 3 on); it goes with no
    path. `familiarity` is the center and scale of its curve; None in version 1, and where the fit made none.
    `general`: it has general texts (from version 3 on).
    """

    experts: tuple[str, ...]
    encoder: EncoderSpec
    encoder_path: str | None
    encoder_package: Package | None
    classifier: str | None
    classifier_path: str | None
    calibration: dict[Strategy, Calibration]
    hybrid_weight: float
    centring: bool
    familiarity: tuple[float, float] | None
    general: bool


def read_header(file: Path) -> Header:
    """Parse and check the whole file. Raises RouterFileError."""
    raw = read_json(file)
    version = raw.get("version") if isinstance(raw, dict) else None
    keys = _KEYS_OF.get(version) if isinstance(version, int) and version is not True else None
    content = _object(file, "", raw, keys or _KEYS_OF[VERSION])
    if content["format"] != FORMAT:
        raise RouterFileError(file, "format", f"expected {FORMAT!r}, got {content['format']!r}")
    if keys is None:
        problem = f"this release reads versions {', '.join(map(str, _KEYS_OF))}, got {version!r}"
        raise RouterFileError(file, "version", problem)
    newest = keys is _KEYS_OF[NEWEST_VERSION]
    kind = _classifier_kind(file, content["classifier"])
    return Header(
        experts=_experts(file, content["experts"]),
        encoder=_spec(file, content["encoder"], packaged=newest),
        encoder_path=content["encoder"]["path"],
        encoder_package=_package(file, content["encoder"]),
        classifier=kind,
        classifier_path=content["classifier"]["path"] if kind == "transformer" else None,
        calibration=_calibration(file, content["calibration"]),
        hybrid_weight=_number(file, "hybrid_weight", content["hybrid_weight"], 0.0, 1.0),
        centring=_expect(file, "centring", content["centring"], bool),
        familiarity=_curve(file, content.get("familiarity"), newest=newest),
        general=newest and bool((content["familiarity"] or {}).get("general")),
    )


def _experts(file: Path, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(one, str) and one for one in value):
        raise RouterFileError(file, "experts", "expected a non-empty list of ids")
    if len(set(value)) != len(value):
        raise RouterFileError(file, "experts", "an id occurs twice")
    return tuple(value)


def _spec(file: Path, value: Any, *, packaged: bool) -> EncoderSpec:
    entry = _object(file, "encoder", value, (*_ENCODER_KEYS, "package") if packaged else _ENCODER_KEYS)
    for name in ("id", "prefix", "pooling"):
        _expect(file, f"encoder.{name}", entry[name], str)
    for name in ("dimension", "max_tokens"):
        if _expect(file, f"encoder.{name}", entry[name], int) < 1:
            raise RouterFileError(file, f"encoder.{name}", f"must be at least 1, got {entry[name]}")
    if entry["normalize"] is not True:
        raise RouterFileError(file, "encoder.normalize", "must be true: similarities are cosines")
    if entry["path"] is not None:
        _expect(file, "encoder.path", entry["path"], str)
    return EncoderSpec(**{field.name: entry[field.name] for field in fields(EncoderSpec)})


def _package(file: Path, entry: dict[str, Any]) -> Package | None:
    if entry.get("package") is None:
        return None
    content = _object(file, "encoder.package", entry["package"], [field.name for field in fields(Package)])
    package = Package(**{key: _expect(file, f"encoder.package.{key}", content[key], str) for key in content})
    if not re.fullmatch(r"\w+", package.name):
        raise RouterFileError(file, "encoder.package.name", f"{package.name!r} is not the name of a module")
    if entry["path"] is not None:
        raise RouterFileError(file, "encoder.path", "must be null: the encoder comes from a package")
    return package


def _classifier_kind(file: Path, value: Any) -> str | None:
    if value is None:
        return None
    entry = _object(file, "classifier", value, ("kind", "path"))
    if entry["kind"] not in ("linear", "transformer"):
        raise RouterFileError(file, "classifier.kind", f"{entry['kind']!r} is not linear or transformer")
    if entry["kind"] == "transformer":
        _expect(file, "classifier.path", entry["path"], str)
    return str(entry["kind"])


def _calibration(file: Path, value: Any) -> dict[Strategy, Calibration]:
    entries = _object(file, "calibration", value, STRATEGIES)
    result: dict[Strategy, Calibration] = {}
    for strategy in STRATEGIES:
        field = f"calibration.{strategy}"
        entry = _object(file, field, entries[strategy], ("temperature", "threshold"))
        result[strategy] = Calibration(
            _number(file, f"{field}.temperature", entry["temperature"], 1e-4, 1e4),
            _number(file, f"{field}.threshold", entry["threshold"], -1.0, 1.0),
        )
    return result


def _curve(file: Path, value: Any, *, newest: bool) -> tuple[float, float] | None:
    if value is None:
        return None
    entry = _object(file, "familiarity", value, ("center", "scale", *(("general",) if newest else ())))
    if newest:
        _expect(file, "familiarity.general", entry["general"], bool)
    center = _number(file, "familiarity.center", entry["center"], -1e12, 1e12)
    return center, _number(file, "familiarity.scale", entry["scale"], 1e-12, 1e12)


def _object(file: Path, field: str, value: Any, keys: Sequence[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RouterFileError(file, field, "expected an object")
    unknown, missing = sorted(set(value) - set(keys)), [key for key in keys if key not in value]
    if unknown or missing:
        raise RouterFileError(file, field, f"unknown keys {unknown}, missing keys {missing}")
    return value


def _expect(file: Path, field: str, value: Any, kind: type[T]) -> T:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise RouterFileError(file, field, f"expected {kind.__name__}, got {value!r}")
    return value


def _number(file: Path, field: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise RouterFileError(file, field, f"expected a number from {low} to {high}, got {value!r}")
    return float(value)
