"""The compiled libraries of the operators, where the package was installed with a C++ compiler."""

import ctypes
from pathlib import Path

import torch  # noqa: F401 - loaded first, so that both use one OpenMP and one team of threads


def compiled(beside: str) -> ctypes.CDLL | None:
    """The library in the folder of the file `beside`; `None` where none was built."""
    for path in sorted(Path(beside).parent.glob("_native*.so")):
        return ctypes.CDLL(str(path))
    return None
