"""The config of a sparse model, taken field by field; what is left over at the end was not understood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from loramux.adapters.adapter_files import read_object
from loramux.adapters.errors import AdapterFormatError, BaseMismatchError, UnsupportedAdapterError
from loramux.adapters.peft_config import module_names

MAX_RANK = 2**16
MAX_EXPERTS = 1024
MAX_ALPHA = 1e6

_WITHOUT_EFFECT = (
    "auto_mapping",
    "inference_mode",
    "init_lora_weights",
    "lora_dropout",
    "lora_init",
    "name",
    "peft_version",
    "revision",
    "task_name",
)
_CHANGES_BASE = {
    "modules_to_save": "it replaces whole modules of the base",
    "fan_in_fan_out": "the base weights would be transposed, and only linear modules are served",
    "lora_bias": "it trains a bias on lora_B",
}


class Fields:
    """Fields of `adapter_config.json`, each checked when it is taken. A null is a field that is not there.

    Args:
        path: of the file, for messages.
        values: its fields.
    """

    def __init__(self, path: Path, values: Mapping[str, object]) -> None:
        self.path = path
        self._values = {name: value for name, value in values.items() if value is not None}
        self._own = tuple(self._values)
        self._taken: set[str] = set(_WITHOUT_EFFECT)

    @classmethod
    def read(cls, path: Path) -> Fields:
        """From a file.

        Raises:
            AdapterFormatError: too large, not JSON, or not an object.
        """
        return cls(path, read_object(path))

    def peek(self, name: str) -> object:
        """The value as it stands, which does not count as taken; None if it is not there."""
        return self._values.get(name)

    def skip(self, *names: str) -> None:
        """Fields that matter only while training."""
        self._taken.update(names)

    def whole(self, name: str, default: int | None = None, *, low: int = 1, high: int) -> int:
        """A whole number within bounds; required unless there is a default.

        Raises:
            AdapterFormatError: missing, not a whole number, or out of bounds.
        """
        value = self._take(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.bad(name, f"must be a whole number from {low} to {high}", value)
        return value

    def number(
        self, name: str, default: float | None = None, *, low: float, high: float, above: bool = False
    ) -> float:
        """A number within bounds; required unless there is a default.

        Args:
            above: `low` itself is out of bounds.

        Raises:
            AdapterFormatError: missing, not a number, or out of bounds.
        """
        value = self._take(name, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not low <= value <= high
            or (above and value == low)
        ):
            bound = f"above {low:g}" if above else f"at least {low:g}"
            raise self.bad(name, f"must be a number {bound} and at most {high:g}", value)
        return float(value)

    def flag(self, name: str) -> bool:
        """true or false; false where it is not there.

        Raises:
            AdapterFormatError: something else.
        """
        value = self._take(name, False)
        if not isinstance(value, bool):
            raise self.bad(name, "must be true or false", value)
        return value

    def choice(self, name: str, options: Sequence[str], default: str | None = None) -> str:
        """One of some words; required unless there is a default.

        Raises:
            AdapterFormatError: missing.
            UnsupportedAdapterError: another word.
        """
        value = self._take(name, default)
        if value not in options:
            raise UnsupportedAdapterError(
                f"{self.path}: {name} is {_short(value)}; served are {', '.join(options)}"
            )
        assert isinstance(value, str)
        return value

    def targets(self) -> tuple[str, ...] | str:
        """`target_modules`: names, a regular expression, or an object of name -> whether.

        Raises:
            AdapterFormatError: missing, empty, or none of these.
        """
        value = self._take("target_modules", None)
        if isinstance(value, dict):
            if not all(isinstance(chosen, bool) for chosen in value.values()):
                raise self.bad("target_modules", "as an object must hold true or false", value)
            value = [name for name, chosen in value.items() if chosen]
        names = module_names({"target_modules": value}, self.path, "target_modules")
        if not names:
            raise self.bad("target_modules", "must name at least one module", value)
        return names

    def inner(self, name: str) -> Fields | None:
        """An object inside, whose missing fields are those of this config; None if it is not there.

        Raises:
            AdapterFormatError: not an object.
        """
        value = self._values.get(name)
        self._taken.add(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.bad(name, "must be an object", value)
        inner = Fields(self.path, {**self._values, **value})
        inner._own = tuple(key for key in value if key in inner._values)
        return inner

    def check_base(self, base_id: str, *, override: bool) -> None:
        """Refuse a config made for another base, unless the operator says that it fits.

        Raises:
            BaseMismatchError: `base_model_name_or_path` is another name.
        """
        named = self._values.get("base_model_name_or_path")
        self._taken.add("base_model_name_or_path")
        if named and named != base_id and not override:
            raise BaseMismatchError(
                f"{self.path}: base_model_name_or_path is {_short(named)}, but this base is {base_id!r}; if "
                "the model does belong to it, override the base (names and shapes are checked all the same)"
            )

    def finish(self) -> None:
        """Refuse what would change the result and was not taken.

        Raises:
            UnsupportedAdapterError: names the field.
        """
        bias = self._values.get("bias", "none")
        if bias != "none":
            raise UnsupportedAdapterError(f"{self.path}: bias is {_short(bias)}; only 'none' is served")
        self._taken |= {"bias", "task_type", "peft_type"}
        for name in self._own:
            value = self._values[name]
            if name in self._taken or value is False or value in ("", [], {}):
                continue
            if name in _CHANGES_BASE:
                raise UnsupportedAdapterError(f"{self.path}: {name} is set: {_CHANGES_BASE[name]}")
            raise UnsupportedAdapterError(
                f"{self.path}: unknown field {name!r} = {_short(value)}; it may change the result, so it is "
                "refused"
            )

    def bad(self, name: str, rule: str, value: object) -> AdapterFormatError:
        """The error for a value that breaks a rule."""
        found = "it is missing" if value is None else f"got {_short(value)}"
        return AdapterFormatError(f"{self.path}: {name} {rule}, {found}")

    def _take(self, name: str, default: object) -> object:
        self._taken.add(name)
        return self._values.get(name, default)


def _short(value: object) -> str:
    # Python refuses to spell whole numbers of over 4,300 digits.
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a whole number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
