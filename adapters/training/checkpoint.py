"""A training run's state in one safetensors file: weights, optimiser tensors, and how far it got."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from loramux.adapters.training.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run got: optimiser steps done, seconds spent in them, smoothed loss per token."""

    step: int
    seconds: float
    loss: float


def save(
    path: Path,
    fingerprint: str,
    progress: Progress,
    parameters: Mapping[str, Tensor],
    optimisers: Sequence[torch.optim.Optimizer],
) -> None:
    """Write the state so that a kill at any moment leaves either the old file or the new one.

    Optimiser state goes in as named tensors, never as a pickle. `fingerprint` stands for everything the run
    depends on and must be the same when it is resumed.
    """
    tensors = {f"parameter/{name}": value.detach().contiguous() for name, value in parameters.items()}
    for number, optimiser in enumerate(optimisers):
        for index, state in optimiser.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"optimiser/{number}/{index}/{key}"] = value.detach().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(
        tensors, partial, metadata={"fingerprint": fingerprint, "progress": json.dumps(asdict(progress))}
    )
    with partial.open("rb") as written:
        os.fsync(written.fileno())
    partial.replace(path)


def load(
    path: Path,
    fingerprint: str,
    parameters: Mapping[str, Tensor],
    optimisers: Sequence[torch.optim.Optimizer],
) -> Progress | None:
    """Put a saved state back in place; None when there is no file, or it belongs to other inputs.

    Raises:
        CheckpointError: the file is damaged or does not fit the model.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            if metadata.get("fingerprint") != fingerprint:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            progress = Progress(**json.loads(metadata["progress"]))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a readable checkpoint ({error}); delete it to start anew"
        ) from error
    with torch.no_grad():
        for name, parameter in parameters.items():
            saved = tensors.get(f"parameter/{name}")
            if saved is None or saved.shape != parameter.shape:
                raise CheckpointError(f"{path}: {name} is missing or does not fit; delete it to start anew")
            parameter.copy_(saved)
    for number, optimiser in enumerate(optimisers):
        state: dict[int, dict[str, Tensor]] = {}
        prefix = f"optimiser/{number}/"
        for name, value in tensors.items():
            if name.startswith(prefix):
                index, key = name.removeprefix(prefix).split("/")
                state.setdefault(int(index), {})[key] = value
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    return progress
