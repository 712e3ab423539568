"""`--set name=value`: any setting as a flag."""

from typing import Any

import yaml

from loramux.server.errors import UsageError


def put(flags: dict[str, Any], text: str) -> None:
    """Put `section.name=value` into nested flags; the value is YAML.

    Raises:
        UsageError: it is not of that form.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--set {text}: write it as name=value")
    *sections, last = name.strip().split(".")
    for section in sections:
        flags = flags.setdefault(section, {})
        if not isinstance(flags, dict):
            raise UsageError(f"--set {text}: {section} is not a section")
    try:
        flags[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UsageError(f"--set {text}: the value is not YAML") from None
