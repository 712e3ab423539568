"""`GET /v1/models`."""

from collections.abc import Iterable
from typing import Any


def model_card(name: str, created: int, *, root: str, parent: str | None, context: int) -> dict[str, Any]:
    """One entry: `root` is what it is made from, `parent` the base it sits on."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "loramux",
        "root": root,
        "parent": parent,
        "max_model_len": context,
    }


def model_list(cards: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The list object."""
    return {"object": "list", "data": list(cards)}
