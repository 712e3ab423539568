"""Loading and unloading experts and sparse models while the server runs."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from loramux.adapters.errors import AdapterError
from loramux.adapters.lora import LoraAdapter
from loramux.adapters.sparse.model import SparseModel
from loramux.adapters.sparse.options import DEFAULT, ReadOptions
from loramux.adapters.sparse.shelf import SparseCard
from loramux.router.joining import Joined
from loramux.router.router import Router as FittedRouter
from loramux.server.catalog import Catalog
from loramux.server.errors import Conflict, RequestError, UnknownModel
from loramux.server.leases import ExpertStore, SparseStore
from loramux.server.selection import Router


@dataclass(frozen=True, slots=True)
class Loaded:
    """What is served now. `truncated` of the example texts were longer than the encoder reads; None: there
    were none."""

    adapter: LoraAdapter | SparseCard
    truncated: int | None = None


class AdapterAdmin:
    """One change at a time; a load that fails leaves nothing behind.

    `read` takes a directory, an id and options, and gives the checked adapter or sparse model, whichever the
    files are. A loaded expert can be named, by `model` or in `lora`, and takes part in `arrow`, `spectr` and
    `logo`. It is routed to if the router knows its content, or comes to know it by example texts. A sparse
    model can be named by `model`.
    """

    def __init__(
        self,
        catalog: Catalog,
        residency: ExpertStore,
        shelf: SparseStore,
        router: Router,
        root: Path,
        read: Callable[[Path, str, ReadOptions], LoraAdapter | SparseModel],
    ) -> None:
        self._catalog = catalog
        self._residency = residency
        self._shelf = shelf
        self._router = router
        self._root = root
        self._read = read
        self._busy = asyncio.Lock()

    async def load(
        self, name: str, path: str, options: ReadOptions = DEFAULT, examples: Sequence[str] | None = None
    ) -> Loaded:
        """Read an adapter or sparse model below the adapter root and serve it as `name`.

        With `examples`, texts that it should answer, an adapter is routed to from then on.

        Raises:
            Conflict: the name is taken, or the adapter is routed to under another.
            RequestError: the path leads elsewhere, or the adapter is refused, with the reason.
            RoutingExamplesError: the router can make no route from the examples.
        """
        async with self._busy:
            self._refuse_taken(name)
            folder = self._confined(path)
            try:
                found = await asyncio.to_thread(self._read, folder, name, options)
                if isinstance(found, SparseModel):
                    return Loaded(await self._add_sparse(found, examples))
                joined = await self._joined(found, examples)
                # No await from here on: a request finds both the expert and its route, or neither.
                self._residency.add_expert(found)
            except AdapterError as error:
                raise RequestError(str(error), param="lora_path", code="adapter_refused") from None
            if joined is not None:
                self._router.use(joined.router)
            truncated = 0 if joined is None else joined.truncated
            return Loaded(found, None if examples is None else truncated)

    async def unload(self, name: str) -> None:
        """Stop serving an expert or sparse model; requests that run keep it to their end.

        Raises:
            UnknownModel: no such expert or sparse model.
        """
        async with self._busy:
            if name in self._catalog.experts:
                router = await self._without_route(name)
                self._residency.remove_expert(name)
                if router is not None:
                    self._router.use(router)
            elif name in self._catalog.sparse:
                self._shelf.remove(name)
            else:
                raise self._unknown(name)

    def _refuse_taken(self, name: str) -> None:
        if self._catalog.is_taken(name):
            raise Conflict(f"{name!r} is taken; unload it first or choose another name", param="lora_name")

    def _unknown(self, name: str) -> UnknownModel:
        loaded = (*sorted(self._catalog.experts), *sorted(self._catalog.sparse))
        return UnknownModel(name, param="lora_name", known=loaded)

    async def _add_sparse(self, model: SparseModel, examples: Sequence[str] | None) -> SparseCard:
        self._refuse_examples(model, examples)
        return await self._shelf.add(model)

    @staticmethod
    def _refuse_examples(model: SparseModel | SparseCard, examples: Sequence[str] | None) -> None:
        if examples is not None:
            raise RequestError(
                f"routing_examples are for LoRAs; {model.id!r} is {model.kind}, which is asked for by name",
                param="routing_examples",
                code="invalid_value",
            )

    async def _joined(self, expert: LoraAdapter, examples: Sequence[str] | None) -> Joined | None:
        """The router with a route for the expert; None when none is asked for, or the pool's comes back."""
        if examples is None:
            return None
        content = expert.content_hash
        for other, served in self._catalog.experts.items():
            if served.content_hash == content:
                raise Conflict(
                    f"{other!r} has the same content, and content has one route; unload it first, or leave "
                    "routing_examples out",
                    param="routing_examples",
                )
        return None if self._catalog.is_known(content) else await self._router.joined(content, examples)

    async def _without_route(self, name: str) -> FittedRouter | None:
        """The router without the route that the expert joined by; None to leave it as it is.

        A route stays while its content is served under another name.
        """
        contents = [expert.content_hash for expert in self._catalog.experts.values()]
        content = self._catalog.experts[name].content_hash
        if contents.count(content) > 1 or not self._catalog.has_joined(content):
            return None
        return await self._router.left(content)

    def _confined(self, path: str) -> Path:
        """The directory, links resolved, if it lies below the root."""
        refused = RequestError(
            "lora_path must be a directory below the configured adapter root",
            param="lora_path",
            code="path_refused",
        )
        if "\x00" in path or "\\" in path or "://" in path:
            raise refused
        root = self._root.resolve()
        try:
            folder = (root / path).resolve()
            inside = folder != root and folder.is_relative_to(root) and folder.is_dir()
        except (OSError, RuntimeError):
            raise refused from None
        if not inside:
            raise refused
        return folder
