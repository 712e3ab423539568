"""Loading and unloading experts while the server runs."""

import asyncio
from collections.abc import Callable
from pathlib import Path

from loramux.adapters.errors import AdapterError
from loramux.adapters.lora import LoraAdapter
from loramux.adapters.residency import Residency
from loramux.server.catalog import AUTO, Catalog
from loramux.server.errors import Conflict, RequestError, UnknownModel


class AdapterAdmin:
    """One change at a time; a load that fails leaves nothing behind.

    `read` takes a directory and an id and gives the checked adapter. A loaded expert can be named, by `model`
    or in `lora`; the router does not know it, so `auto` never picks it.
    """

    def __init__(
        self, catalog: Catalog, residency: Residency, root: Path, read: Callable[[Path, str], LoraAdapter]
    ) -> None:
        self._catalog = catalog
        self._residency = residency
        self._root = root
        self._read = read
        self._busy = asyncio.Lock()

    async def load(self, name: str, path: str) -> LoraAdapter:
        """Read an adapter below the adapter root and serve it as `name`.

        Raises:
            Conflict: the name is taken.
            RequestError: the path leads elsewhere, or the adapter is refused, with the reason.
        """
        async with self._busy:
            if name in (AUTO, self._catalog.base) or name in self._catalog.experts:
                raise Conflict(
                    f"{name!r} is taken; unload it first or choose another name", param="lora_name"
                )
            folder = self._confined(path)
            try:
                adapter = await asyncio.to_thread(self._read, folder, name)
            except AdapterError as error:
                raise RequestError(str(error), param="lora_path", code="adapter_refused") from None
            self._residency.add_expert(adapter)
            return adapter

    async def unload(self, name: str) -> None:
        """Stop serving an expert; requests that run keep it to their end.

        Raises:
            UnknownModel: no such expert.
        """
        async with self._busy:
            if name not in self._catalog.experts:
                raise UnknownModel(name, param="lora_name", known=tuple(sorted(self._catalog.experts)))
            self._residency.remove_expert(name)

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
