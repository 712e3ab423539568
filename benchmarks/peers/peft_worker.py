"""PEFT's side, run by compare.py with the interpreter of PEFT's own virtual environment.

    VENV/bin/python benchmarks/peers/peft_worker.py POOL float32|bfloat16 THREADS

One JSON object a line in, one out; "do" says what, the other fields are the arguments of that method.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

BARE = "__base__"
# PEFT takes a dense SVD of every module; this many layers are done and the time is scaled up.
SVD_LAYERS = 1


class Clock(LogitsProcessor):  # type: ignore[misc]
    """Changes nothing; notes when each step's logits are there."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        self.stamps.append(time.perf_counter())
        return scores


class Worker:
    """The base with every adapter of the pool loaded."""

    def __init__(self, pool: Path, dtype: torch.dtype) -> None:
        self.pool = pool
        self.dtype = dtype
        self.names = sorted(folder.name for folder in (pool / "experts").iterdir())
        self.model = self._load(self.names, layers=None)
        self.layers = self.model.config.num_hidden_layers

    def _load(self, names: list[str], layers: int | None) -> Any:
        config = AutoConfig.from_pretrained(self.pool / "base")
        config.num_hidden_layers = layers or config.num_hidden_layers
        base = AutoModelForCausalLM.from_pretrained(self.pool / "base", config=config, dtype=self.dtype)
        first, *others = names
        folders = {name: str(self.pool / "experts" / name) for name in names}
        options: dict[str, Any] = {"autocast_adapter_dtype": False}
        model = PeftModel.from_pretrained(base, folders[first], first, **options)
        for name in others:
            model.load_adapter(folders[name], name, **options)
        return model.eval().requires_grad_(False)

    @torch.inference_mode()
    def generate(self, ids: list[list[int]], adapters: list[str], tokens: int) -> dict[str, Any]:
        """One static batch, greedy: PEFT's mixed batch, or the base with all adapters off.

        Args:
            ids: prompts of one length.
            adapters: a name for every prompt; the bare base has only `BARE`.
            tokens: of every answer.
        """
        batch = torch.tensor(ids)
        clock = Clock()
        bare = all(name == BARE for name in adapters)
        named = {} if bare else {"adapter_names": adapters}
        started = time.perf_counter()
        with self.model.disable_adapter() if bare else contextlib.nullcontext():
            output = self.model.generate(
                input_ids=batch,
                attention_mask=torch.ones_like(batch),
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                do_sample=False,
                logits_processor=LogitsProcessorList([clock]),
                **named,
            )
        seconds = time.perf_counter() - started
        return {
            "seconds": seconds,
            "stamps": [stamp - started for stamp in clock.stamps],
            "ids": output[:, batch.shape[1] :].tolist(),
        }

    def blend(self, name: str, experts: list[str], weights: list[float]) -> dict[str, Any]:
        """Add the exact blend (`cat`) of some experts under a name."""
        self.model.add_weighted_adapter(experts, weights, name, combination_type="cat")
        return {}

    def merge(self, method: str, experts: list[str], weights: list[float]) -> dict[str, Any]:
        """Seconds of `add_weighted_adapter` on the whole model; `svd` is scaled up from one layer."""
        layers = SVD_LAYERS if method == "svd" else self.layers
        model = self.model if layers == self.layers else self._load(experts, layers)
        started = time.perf_counter()
        model.add_weighted_adapter(experts, weights, "merged", combination_type=method)
        seconds = (time.perf_counter() - started) * self.layers / layers
        model.delete_adapter("merged")
        return {"seconds": seconds, "measured_layers": layers, "layers": self.layers}


def main() -> None:
    pool, dtype, threads = sys.argv[1:]
    # The answers go to what was standard output; anything that a library prints goes to the log.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(int(threads))
    worker = Worker(Path(pool), getattr(torch, dtype))
    work: dict[str, Callable[..., dict[str, Any]]] = {
        "generate": worker.generate,
        "blend": worker.blend,
        "merge": worker.merge,
    }
    print(json.dumps({"ready": worker.names}), file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(work[order.pop("do")](**order)), file=answers, flush=True)


if __name__ == "__main__":
    main()
