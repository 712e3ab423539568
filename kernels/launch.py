"""One launch of a Triton kernel, made before it is run: it can also be compiled for another device."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Launch:
    """What a kernel would be compiled for, and what it would be given.

    Attributes:
        arguments: by name; at least one tensor, all on one device.
        constants: what the kernel is specialised for.
    """

    kernel: Any
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, int]

    def run(self) -> None:
        if all(self.grid):
            anchor = next(value for value in self.arguments.values() if isinstance(value, torch.Tensor))
            with torch.cuda.device_of(anchor):  # type: ignore[no-untyped-call]
                self.kernel[self.grid](**self.arguments, **self.constants, **self.options)
