"""Python and the packages: what is installed, and whether it is what this release needs."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from loramux.server.doctor.finding import Finding, Level

#: Those whose versions are worth telling.
_TOLD = ("torch", "transformers", "peft", "bitsandbytes", "faiss-cpu", "sentence-transformers", "triton")


def software() -> Iterator[Finding]:
    """The release, then each package that is missing or of another version than is needed."""
    yield Finding("release", Level.OK, f"loramux {version('loramux')}, Python {platform.python_version()}")
    wrong = [finding for text in requires("loramux") or () if (finding := _judged(Requirement(text)))]
    yield from wrong
    told = ", ".join(f"{name} {found}" for name in _TOLD if (found := _installed(name)))
    yield Finding("packages", Level.NOTE if wrong else Level.OK, told)


def _judged(needed: Requirement) -> Finding | None:
    """What is wrong with a package; None where nothing is, and of extras, which nobody has to have."""
    if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
        return None
    found = _installed(needed.name)
    advice = f"pip install '{needed.name}{needed.specifier}'"
    if found is None:
        return Finding("packages", Level.PROBLEM, f"{needed.name} is not installed", advice)
    if needed.specifier.contains(found, prereleases=True):
        return None
    text = f"{needed.name} {found} is installed; this release is made for {needed.specifier}"
    return Finding("packages", Level.PROBLEM, text, advice)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
