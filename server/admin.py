"""Loading and unloading experts and sparse models while the server runs."""

import asyncio
from collections.abc import Callable
from pathlib import Path

from loramux.adapters.errors import AdapterError
from loramux.adapters.lora import LoraAdapter
from loramux.adapters.residency import Residency
from loramux.adapters.sparse.model import SparseModel
from loramux.adapters.sparse.options import DEFAULT, ReadOptions
from loramux.adapters.sparse.shelf import Shelf, SparseCard
from loramux.server.catalog import Catalog
from loramux.server.errors import Conflict, RequestError, UnknownModel


class AdapterAdmin:
    """One change at a time; a load that fails leaves nothing behind.

    `read` takes a directory, an id and options, and gives the checked adapter or sparse model, whichever the
    files are. A loaded expert can be named, by `model` or in `lora`, and takes part in `arrow`; the router
    does not know it. A sparse model can be named by `model`.
    """

    def __init__(
        self,
        catalog: Catalog,
        residency: Residency,
        shelf: Shelf,
        root: Path,
        read: Callable[[Path, str, ReadOptions], LoraAdapter | SparseModel],
    ) -> None:
        self._catalog = catalog
        self._residency = residency
        self._shelf = shelf
        self._root = root
        self._read = read
        self._busy = asyncio.Lock()

    async def load(self, name: str, path: str, options: ReadOptions = DEFAULT) -> LoraAdapter | SparseCard:
        """Read an adapter or sparse model below the adapter root and serve it as `name`.

        Raises:
            Conflict: the name is taken.
            RequestError: the path leads elsewhere, or the adapter is refused, with the reason.
        """
        async with self._busy:
            if self._catalog.is_taken(name):
                raise Conflict(
                    f"{name!r} is taken; unload it first or choose another name", param="lora_name"
                )
            folder = self._confined(path)
            try:
                found = await asyncio.to_thread(self._read, folder, name, options)
                if isinstance(found, SparseModel):
                    return await self._shelf.add(found)
                self._residency.add_expert(found)
            except AdapterError as error:
                raise RequestError(str(error), param="lora_path", code="adapter_refused") from None
            return found

    async def unload(self, name: str) -> None:
        """Stop serving an expert or sparse model; requests that run keep it to their end.

        Raises:
            UnknownModel: no such expert or sparse model.
        """
        async with self._busy:
            if name in self._catalog.experts:
                self._residency.remove_expert(name)
            elif name in self._catalog.sparse:
                self._shelf.remove(name)
            else:
                loaded = (*sorted(self._catalog.experts), *sorted(self._catalog.sparse))
                raise UnknownModel(name, param="lora_name", known=loaded)

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
