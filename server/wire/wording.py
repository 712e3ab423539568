"""What is wrong with a field, in our own words."""

from collections.abc import Callable, Mapping
from typing import Any

Context = Mapping[str, Any]


def _entries(count: int) -> str:
    return "1 entry" if count == 1 else f"{count} entries"


def _characters(count: int) -> str:
    return "1 character" if count == 1 else f"{count} characters"


def _number(bound: float) -> str:
    return str(int(bound)) if bound == int(bound) else str(bound)


_WORDS: Mapping[str, Callable[[Context], str]] = {
    "bool_type": lambda _: "must be true or false",
    "int_type": lambda _: "must be an integer",
    "int_from_float": lambda _: "must be an integer",
    "float_type": lambda _: "must be a number",
    "finite_number": lambda _: "must be a finite number",
    "string_type": lambda _: "must be a string",
    "list_type": lambda _: "must be a list",
    "dict_type": lambda _: "must be an object",
    "model_type": lambda _: "must be an object",
    "literal_error": lambda context: f"must be {context['expected']}",
    "greater_than": lambda context: f"must be greater than {_number(context['gt'])}",
    "greater_than_equal": lambda context: f"must be at least {_number(context['ge'])}",
    "less_than_equal": lambda context: f"must be at most {_number(context['le'])}",
    "string_too_short": lambda context: f"must have at least {_characters(context['min_length'])}",
    "string_too_long": lambda context: f"must have at most {_characters(context['max_length'])}",
    "string_pattern_mismatch": lambda context: f"must match {context['pattern']}",
    "too_short": lambda context: f"must have at least {_entries(context['min_length'])}",
    "too_long": lambda context: f"must have at most {_entries(context['max_length'])}",
}


def worded(error: Mapping[str, Any]) -> str:
    """One of pydantic's errors; what its own validators did not find speaks for itself."""
    context: Context = error.get("ctx", {})
    if isinstance(cause := context.get("error"), ValueError):
        return str(cause)
    words = _WORDS.get(error["type"])
    return str(error["msg"]) if words is None else words(context)
