"""Where a base's files are: a model folder, a GGUF file, a package with one, or a cached hub id."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from loramux.server.engine.gguf.container import GgufFile
from loramux.server.engine.gguf.folder import SOURCE_FILE, content_hash, model_folder
from loramux.server.engine.gguf.weights import GgufWeights
from loramux.server.engine.model import BaseModelError
from loramux.server.errors import StartError
from loramux.server.gguf_path import find_gguf


@dataclass(frozen=True, slots=True)
class BaseFiles:
    """A base, found.

    Attributes:
        given: how it was named: a path, a package or a hub id.
        folder: what transformers loads: a model folder, or a hub id for the local cache.
        gguf: the GGUF file that the folder was made from, where one was named.
        id: what the base calls itself, where it does.
        content: the SHA-256 of the GGUF file that the folder was made from, in hex.
    """

    given: str
    folder: str
    gguf: Path | None = None
    id: str | None = None
    content: str | None = None

    @classmethod
    def locate(cls, given: str, *, content: str | None = None) -> BaseFiles:
        """Find a base; of a GGUF file the model folder is made, if it is not in the cache yet.

        Args:
            given: a model folder, a GGUF file, a folder or an installed package with one GGUF file in it, or
                a hub id.
            content: what the SHA-256 of the GGUF file has to be; None takes any.

        Raises:
            StartError: there is no such thing, it is damaged or not supported, or its content is another.
        """
        file = find_gguf(given)
        try:
            if file is None:
                base = _of_folder(given)
            else:
                found = content_hash(file)
                folder = model_folder(file, found)
                base = cls(given, str(folder), file, _of_folder(str(folder)).id, found)
        except BaseModelError as error:
            raise StartError(f"base model {error}") from None
        if content is not None and base.content != content:
            raise StartError(
                f"base model {given}: its content is not what the pool was made with (sha256 "
                f"{(base.content or 'unknown')[:12]} in place of {content[:12]})"
            )
        return base

    @property
    def is_packaged(self) -> bool:
        """Whether it was named by a package that brings it."""
        return self.gguf is not None and not Path(self.given).exists()

    @property
    def hash(self) -> str:
        """Tells bases apart. A GGUF file and the folder made from it have the same."""
        from loramux.adapters.training.expert import base_hash

        return self.content or base_hash(Path(self.folder))

    def weights(self) -> GgufWeights | None:
        """The weights as they lie in the GGUF file, where one was named.

        Raises:
            BaseModelError: the file has changed and cannot be read any more.
        """
        return None if self.gguf is None else GgufWeights(GgufFile.read(self.gguf))


def _of_folder(folder: str) -> BaseFiles:
    """A model folder, with what it says about itself where it was made from a GGUF file."""
    try:
        source = json.loads((Path(folder) / SOURCE_FILE).read_text(encoding="utf-8"))
        return BaseFiles(folder, folder, id=str(source["id"]), content=str(source["sha256"]))
    except FileNotFoundError:
        return BaseFiles(folder, folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StartError(f"base model {folder}: {SOURCE_FILE} is damaged: {error}") from None
