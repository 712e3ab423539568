"""What a chat template reads beside the messages, and what a client may give it of that."""

import inspect
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta

from loramux.server.errors import RequestError

Value = bool | int | float | str
KWARGS, EFFORT = "chat_template_kwargs", "reasoning_effort"
_OURS = frozenset({"messages", "tools", "documents", "raise_exception", "strftime_now"})
# Marks the assistant's turns for training; jinja does not know it.
_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")


def variables(
    template: object,
    apply: Callable[..., Any],
    kwargs: Mapping[str, Value],
    effort: str | None,
    effort_param: str = EFFORT,
) -> dict[str, Value]:
    """The variables for `template`, from `chat_template_kwargs` and `reasoning_effort`.

    What a template does not read changes nothing and is refused, except where it asks for what is so without
    it: a variable that is not there is false, and a template that knows no effort makes none.

    Args:
        template: as the tokenizer has it: a text, or texts by name.
        apply: what renders it; its own arguments cannot be set.
        kwargs: `chat_template_kwargs`.
        effort: `reasoning_effort`.
        effort_param: the path of the field that has it.

    Raises:
        RequestError: names the variable that the template does not read, or that is not the client's.
    """
    read = _read(template.get("default") if isinstance(template, dict) else template)
    read -= _OURS | set(inspect.signature(apply).parameters)
    asked: dict[str, Value] = {}
    given = [(name, value, f"{KWARGS}.{name[:100]}", not value) for name, value in kwargs.items()]
    if effort is not None:
        given.append((EFFORT, effort, effort_param, effort == "none"))
    for name, value, param, nothing in given:
        if name not in read or name.endswith("_token"):
            if nothing:
                continue
            known = ", ".join(sorted(one for one in read if not one.endswith("_token"))) or "none"
            raise RequestError(
                f"{param}: the chat template has no such variable; it has: {known}",
                param=param,
                code="unsupported_field",
            )
        if name in asked:
            raise RequestError(f"{param} is also in {KWARGS}", param=param, code="invalid_value")
        asked[name] = value
    return asked


@lru_cache(8)
def _read(template: object) -> frozenset[str]:
    """The names that a template reads and does not set."""
    if not isinstance(template, str):
        return frozenset()
    environment = jinja2.Environment(extensions=[jinja2.ext.loopcontrols], autoescape=True)
    try:
        tree = environment.parse(_GENERATION.sub("", template))
    except jinja2.TemplateError:
        return frozenset()
    return frozenset(jinja2.meta.find_undeclared_variables(tree)) - set(environment.globals)
