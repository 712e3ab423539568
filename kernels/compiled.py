"""The compiled libraries of the operators, where the package was installed with a C++ compiler."""

import ctypes
from pathlib import Path

import torch  # loaded first, so that both use one OpenMP and one team of threads
from torch import Tensor


def compiled(beside: str) -> ctypes.CDLL | None:
    """The library in the folder of the file `beside`; `None` where none was built."""
    for path in sorted(Path(beside).parent.glob("_native*.so")):
        return ctypes.CDLL(str(path))
    return None


def readable(*tensors: Tensor) -> bool:
    """Whether a library's operators for float32 may be called with these: on the CPU, without a gradient."""
    return all(
        one.device.type == "cpu" and one.dtype == torch.float32 and not one.requires_grad for one in tensors
    )
