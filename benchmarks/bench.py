"""What every scenario is given: the shape, how often, and a rig that is made, checked and warmed once."""

from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks import oracle
from benchmarks.report import Goal
from benchmarks.rig import Rig, running
from benchmarks.shapes import Shape, write_base
from loramux.adapters.blend import Blend


@dataclass
class Bench:
    """`context` and `tokens` are the lengths of prompts and answers where a scenario leaves them open;
    `repeats` is how many values a median is taken of; `progress` is told what is being measured; the base's
    `quantization` is the shape's on CUDA and none on a CPU where it is not given."""

    shape: Shape
    repeats: int
    stack: AsyncExitStack
    progress: Callable[[str], None]
    device: str = "cpu"
    context: int = 256
    tokens: int = 64
    quantization: str | None = None
    _rig: Rig | None = field(default=None, init=False)
    _folder: Path | None = field(default=None, init=False)

    def goal(self, goal: Goal) -> Goal | None:
        """The goal, for the shape that it was set for."""
        return goal if self.shape.has_goals else None

    def telling(self, name: str) -> Callable[[str], None]:
        """Progress of a part of a scenario."""
        return lambda text: self.progress(f"{name}, {text}")

    @property
    def folder(self) -> Path:
        """The checkpoint of the base, written when first asked for."""
        if self._folder is None:
            self.progress(f"writing a random {self.shape.name} base")
            self._folder = Path(self.stack.enter_context(TemporaryDirectory(prefix="loramux-bench-")))
            dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
            write_base(self.shape, self._folder, dtype)
        return self._folder

    async def rig(self) -> Rig:
        """The engine with its pool: compared with isolated runs and with float64, every expert resident.

        Raises:
            Wrong: it computes something else.
        """
        if self._rig is None:
            folder = self.folder
            self.progress("loading the base, checking the engine")
            cuda = self.device == "cuda"
            quantization = self.quantization or (self.shape.quantization if cuda else "none")
            making = running(
                folder,
                self.shape,
                dtype="float32" if quantization == "none" and not cuda else "bfloat16",
                quantization=quantization,
                device=self.device,
            )
            rig = await self.stack.enter_async_context(making)
            # Weights in 4 bits are judged as they are; a checkpoint has others.
            await oracle.check(rig, folder if quantization == "none" else None)
            await rig.drive([rig.mixture(number) for number in range(8)], prompt=16, tokens=2)
            await rig.drive([Blend.bare()], prompt=16, tokens=2)
            self._rig = rig
        return self._rig
