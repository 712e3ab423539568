"""The measured figures that the simulation computes with: `benchmarks/results/measured-steps.json`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).parents[1] / "results" / "measured-steps.json"


@dataclass(frozen=True, slots=True)
class Steps:
    """How long one replica takes.

    Attributes:
        decode: seconds of a decode step with 0, 1, 2, ... sequences, each with a blend of its own.
        prefill: seconds that a step takes at least when it has prompts in it.
        prefill_token: seconds that each prompt token adds.
        step_tokens: prompt tokens that a step takes at most.
        expert_bytes, copy_rate: of one expert, and bytes a second at which experts are copied in.
        max_running: sequences of a step.
    """

    decode: tuple[float, ...]
    prefill: float
    prefill_token: float
    step_tokens: int
    expert_bytes: float
    copy_rate: float

    @property
    def max_running(self) -> int:
        return len(self.decode) - 1

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> "Steps":
        """From an entry of the file; between the batches that were measured times are interpolated."""
        sizes = sorted(map(int, entry["decode_ms"]))
        times = [entry["decode_ms"][str(size)] / 1e3 for size in sizes]
        decode = np.interp(np.arange(sizes[-1] + 1), sizes, times)
        return cls(
            decode=(0.0, *decode[1:].tolist()),
            prefill=entry["prefill_ms"] / 1e3,
            prefill_token=entry["prefill_token_ms"] / 1e3,
            step_tokens=entry["step_tokens"],
            expert_bytes=entry["expert_bytes"],
            copy_rate=entry["copy_bytes_per_second"],
        )

    def capacity(self, prompt: float, answer: float) -> float:
        """Requests a second that one replica can serve, with full batches and a prompt step each."""
        whole = self.prefill + self.prefill_token * prompt
        return 1 / (whole + answer * self.decode[-1] / self.max_running)


def read(name: str, file: Path = FILE) -> Steps:
    """One machine of the file."""
    entry: Mapping[str, Any] = json.loads(file.read_text())["machines"][name]
    return Steps.of(entry)
