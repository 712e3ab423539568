"""An expert joins a router from a few example texts, and leaves it: each time a new router, without a fit."""

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import RoutingExamplesError
from .fit.router import join_expert, remove_expert
from .router import Router, blank_rows


@dataclass(frozen=True, slots=True, eq=False)
class Joined:
    """The router with the expert, and how many of the texts were longer than the encoder reads."""

    router: Router
    truncated: int


def joined(router: Router, expert: str, texts: Sequence[str]) -> Joined:
    """`router` with an expert more, found by texts like these [n >= 1].

    Raises RoutingExamplesError when a text cannot be read or the router cannot be added to.
    """
    if router.classifier is not router.state.classifier:
        raise RoutingExamplesError(
            None, "this router's classifier is a fine-tuned model, which cannot be given another class"
        )
    encoded = router.embed(texts)
    blank = blank_rows(encoded.vectors)
    if blank.any():
        raise RoutingExamplesError(int(blank.argmax()), "blank, or nothing that the encoder reads")
    state = join_expert(router.state, expert, encoded.vectors)
    return Joined(router.over(state), int(encoded.truncated.sum()))


def left(router: Router, expert: str) -> Router:
    """`router` without an expert; the others keep their scores. Raises RouterError for an unknown one."""
    return router.over(remove_expert(router.state, expert))
