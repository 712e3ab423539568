"""`adapter_config.json` of a PEFT LoRA: what it means for each module, and what in it cannot be served.

Follows PEFT 0.21: rank and alpha of a module come from the first pattern that matches the module path or a
dotted suffix of it, else from `r` and `lora_alpha`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from loramux.adapters.adapter_files import read_object
from loramux.adapters.errors import AdapterFormatError, BaseMismatchError, UnsupportedAdapterError
from loramux.adapters.peft_fields import FIELDS, OTHERS, why_refused

MAX_PATTERN = 1000
MAX_ALPHA = 1e6
T = TypeVar("T")

_BASE_KEEPING_INITS = frozenset({"true", "false", "none", "gaussian", "eva", "orthogonal", "mica"})


@dataclass(frozen=True)
class LoraSettings:
    """The fields of a LoRA config that decide what is computed.

    Attributes:
        r, alpha, use_rslora: of modules that no pattern matches.
        rank_patterns, alpha_patterns: (pattern for the whole module path, value), in the order of the file.
        target_modules, exclude_modules: as in the file.
        layers: the layer numbers that `layers_to_transform` narrows targets down to; None for all.
        layers_patterns: what stands before a layer's number in a path; empty for any word.
    """

    r: int
    alpha: float
    use_rslora: bool
    rank_patterns: tuple[tuple[re.Pattern[str], int], ...]
    alpha_patterns: tuple[tuple[re.Pattern[str], float], ...]
    target_modules: tuple[str, ...] | str
    exclude_modules: tuple[str, ...] | str | None
    layers: frozenset[int] | None
    layers_patterns: tuple[re.Pattern[str], ...]

    def rank(self, module: str) -> int:
        """Rank that the config promises for a module path."""
        return _first_match(self.rank_patterns, module, self.r)

    def scale(self, module: str) -> float:
        """alpha / rank, or alpha / sqrt(rank) for rsLoRA (Kalajdzievski 2023)."""
        rank = self.rank(module)
        return _first_match(self.alpha_patterns, module, self.alpha) / (
            math.sqrt(rank) if self.use_rslora else rank
        )

    def targets(self, module: str) -> bool:
        """Whether PEFT adapts a linear module of this path (`check_target_module_exists` of 0.21).

        `layers_to_transform` narrows down what a list names by suffix, not whole paths and not regular
        expressions.
        """
        if _named(self.exclude_modules, module):
            return False
        if isinstance(self.target_modules, str):
            return self.target_modules.lower() == "all-linear" or _named(self.target_modules, module)
        if module in self.target_modules:
            return True
        return _named(self.target_modules, module) and self._in_layers(module)

    def _in_layers(self, module: str) -> bool:
        if self.layers is None:
            return True
        found = next((match for one in self.layers_patterns if (match := one.match(module))), None)
        return found is not None and int(found["layer"]) in self.layers


def read_settings(path: Path, *, base_id: str, any_base: bool) -> LoraSettings:
    """Parse and check `adapter_config.json`.

    Raises:
        AdapterFormatError: not readable, not a JSON object, or a field has a wrong type or value.
        UnsupportedAdapterError: not a plain LoRA; the message names the field.
        BaseMismatchError: it names another base than `base_id` and `any_base` is False.
    """
    fields = read_object(path)
    _refuse_unsupported(fields, path)
    named = fields.get("base_model_name_or_path")
    if named and named != base_id and not any_base:
        raise BaseMismatchError(
            f"{path}: base_model_name_or_path is {named!r}, but this base is {base_id!r}; "
            "if the adapter does belong to it, allow any base for this expert"
        )
    _check_layer_fields(fields, path)
    rslora = fields.get("use_rslora") or False
    if not isinstance(rslora, bool):
        raise AdapterFormatError(f"{path}: use_rslora must be true or false, got {rslora!r}")
    return LoraSettings(
        r=_rank(fields.get("r"), path, "r"),
        alpha=_alpha(fields.get("lora_alpha"), path, "lora_alpha"),
        use_rslora=rslora,
        rank_patterns=_patterns(fields, path, "rank_pattern", _rank),
        alpha_patterns=_patterns(fields, path, "alpha_pattern", _alpha),
        target_modules=_targets(fields, path),
        exclude_modules=module_names(fields, path, "exclude_modules"),
        layers=_layers(fields, path),
        layers_patterns=_layers_patterns(fields, path),
    )


def _targets(fields: Mapping[str, object], path: Path) -> tuple[str, ...] | str:
    names = module_names(fields, path, "target_modules")
    if names is None:
        raise AdapterFormatError(
            f"{path}: target_modules is null: PEFT would choose by the type of the base, and what it saves "
            "has the names; write the modules that the tensors belong to"
        )
    return names


def _check_layer_fields(fields: Mapping[str, object], path: Path) -> None:
    """PEFT reads no such config, so nothing says what was meant."""
    for name in ("layers_to_transform", "layers_pattern"):
        if isinstance(fields.get("target_modules"), str) and fields.get(name) is not None:
            raise AdapterFormatError(
                f"{path}: {name} is set, but target_modules is an expression, which says the layers itself"
            )
    if fields.get("layers_pattern") and fields.get("layers_to_transform") is None:
        raise AdapterFormatError(f"{path}: layers_pattern is set without layers_to_transform")


def _layers(fields: Mapping[str, object], path: Path) -> frozenset[int] | None:
    value = fields.get("layers_to_transform")
    if value is None or value == []:
        return None
    numbers = value if isinstance(value, list) else [value]
    if not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in numbers):
        raise AdapterFormatError(f"{path}: layers_to_transform must be layer numbers, got {value!r}")
    return frozenset(numbers)


def _layers_patterns(fields: Mapping[str, object], path: Path) -> tuple[re.Pattern[str], ...]:
    value = fields.get("layers_pattern")
    patterns = [value] if isinstance(value, str) and value else value or []
    if not isinstance(patterns, list) or not all(isinstance(one, str) for one in patterns):
        raise AdapterFormatError(f"{path}: layers_pattern must be a name or a list of names, got {value!r}")
    if not patterns:
        return (re.compile(r".*?\.[^.]*\.(?P<layer>\d+)\."),)
    frame = r"(?:^|.*?\.){}\.(?P<layer>\d+)\."
    return tuple(_compile(one, path, "layers_pattern", frame) for one in patterns)


def _refuse_unsupported(fields: Mapping[str, object], path: Path) -> None:
    for name in ("lora_nums", "routing_strategy"):
        if _is_set(fields.get(name)):
            raise UnsupportedAdapterError(f"{path}: {name} is set: {OTHERS[name]}")
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise UnsupportedAdapterError(f"{path}: peft_type is {kind!r}; only 'LORA' can be an expert")
    # `all` and `lora_only` mean biases of the base, which are saved as tensors where there are any: those are
    # refused by name. Without them the adapter is a plain LoRA.
    if fields.get("bias", "none") not in ("none", "all", "lora_only", None):
        raise AdapterFormatError(f"{path}: bias is {fields['bias']!r}, not none, all or lora_only")
    init = fields.get("init_lora_weights", True)
    if str(init).lower() not in _BASE_KEEPING_INITS:
        raise UnsupportedAdapterError(
            f"{path}: init_lora_weights is {init!r}, which changes the base weights; convert the "
            "adapter to a plain LoRA when saving it (PEFT: path_initial_model_for_weight_conversion)"
        )
    for name, value in fields.items():
        if not _is_set(value):
            continue
        if (reason := why_refused(name)) is not None:
            raise UnsupportedAdapterError(f"{path}: {name} is set: {reason}")
        if name in FIELDS:
            continue
        raise UnsupportedAdapterError(
            f"{path}: unknown field {name!r} = {str(value)[:60]}; it may change the result, so it is refused"
        )


def _is_set(value: object) -> bool:
    """Whether a field differs from "off". Zero counts as set: a zero can be a meaningful value."""
    return not (value is None or value is False or value in ("", [], {}))


def _rank(value: object, path: Path, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise AdapterFormatError(f"{path}: rank {name!r} must be a whole number of at least 1, got {value!r}")
    return value


def _alpha(value: object, path: Path, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_ALPHA:
        raise AdapterFormatError(
            f"{path}: alpha {name!r} must be a number of at most {MAX_ALPHA:g}, got {value!r}"
        )
    return float(value)


def _patterns(
    fields: Mapping[str, object], path: Path, name: str, check: Callable[[object, Path, str], T]
) -> tuple[tuple[re.Pattern[str], T], ...]:
    """A pattern must cover the whole module path, or a suffix of it that starts after a dot."""
    value = fields.get(name) or {}
    if not isinstance(value, dict):
        raise AdapterFormatError(f"{path}: {name} must be an object, got {value!r}")
    return tuple(
        (_compile(pattern, path, name, r"(?:.*\.)?(?:{})"), check(entry, path, f"{name}[{pattern}]"))
        for pattern, entry in value.items()
    )


def module_names(fields: Mapping[str, object], path: Path, name: str) -> tuple[str, ...] | str | None:
    """A field that selects modules: names, or a regular expression for whole paths.

    Raises:
        AdapterFormatError: of another type, or an expression that is too long or could take too long.
    """
    value = fields.get(name)
    if isinstance(value, str):
        _compile(value, path, name)
        return value
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise AdapterFormatError(
            f"{path}: {name} must be a list of names or a regular expression, got {value!r}"
        )
    return tuple(value)


def _compile(pattern: str, path: Path, name: str, frame: str = "{}") -> re.Pattern[str]:
    """Compile a pattern from an adapter file, which is not to be trusted with the time it takes.

    Matching a module path of a hundred characters is quick unless a group is repeated: `(a+)+` and `(a|a)*`
    take exponential time. No adapter needs such a thing to name modules.
    """
    if len(pattern) > MAX_PATTERN or re.search(r"\)(?:[*+]|\{)", pattern):
        raise AdapterFormatError(
            f"{path}: {name}: {pattern[:80]!r} repeats a group or is over {MAX_PATTERN} characters; "
            "name the modules in a list instead"
        )
    try:
        return re.compile(frame.replace("{}", pattern, 1))
    except re.error as error:
        raise AdapterFormatError(f"{path}: {name}: {pattern!r} is no regular expression: {error}") from error


def _first_match(patterns: tuple[tuple[re.Pattern[str], T], ...], module: str, default: T) -> T:
    return next((value for pattern, value in patterns if pattern.fullmatch(module)), default)


def _named(names: tuple[str, ...] | str | None, module: str) -> bool:
    """Membership as PEFT decides it: a string is a regular expression, a list holds paths or suffixes."""
    if not names:
        return False
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)
