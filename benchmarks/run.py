"""`python benchmarks/run.py`: makes the packages `benchmarks` and `tests` importable, and runs the suite."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def add_package(name: str) -> None:
    """Import the folder `name` of the repository as a package.

    The repository's root stays off the path: there its folder `kernels` would hide the package of that name
    which transformers looks for.
    """
    folder = ROOT / name
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise SystemExit(f"{folder} is not a package")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


if __name__ == "__main__":
    for package in ("benchmarks", "tests"):
        add_package(package)
    from loramux.server.torch_memory import arrange_memory

    arrange_memory()
    from benchmarks.suite import main

    main()
