"""`GET /v1/models`."""

from collections.abc import Iterable, Mapping
from typing import Any


def model_card(
    name: str,
    created: int,
    *,
    root: str,
    parent: str | None,
    context: int,
    about: Mapping[str, object] | None = None,
) -> dict[str, Any]:
    """One entry: `root` is what it is made from, `parent` the base it sits on, `about` our own summary."""
    card = {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "loramux",
        "root": root,
        "parent": parent,
        "max_model_len": context,
    }
    return card if about is None else {**card, "loramux": dict(about)}


def model_list(cards: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The list object."""
    return {"object": "list", "data": list(cards)}
