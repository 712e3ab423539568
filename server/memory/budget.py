"""One place that decides how much memory everything gets: base + pool + slots + key-value cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from loramux.adapters.arena import row_bytes
from loramux.adapters.base_shapes import BaseShapes
from loramux.adapters.peft_tensors import StackShape
from loramux.adapters.sparse.read import SparseSize
from loramux.kernels.packed_linear import Kinds
from loramux.router.encoder_place import EncoderPlace
from loramux.router.errors import RouterError
from loramux.router.store import encoder_elsewhere
from loramux.server.engine.local import EngineLimits
from loramux.server.engine.weights import FULL, QUANTIZED
from loramux.server.errors import StartError
from loramux.server.memory.blueprint import Blueprint, Target
from loramux.server.memory.room import Room
from loramux.server.pool.manifest import Pool
from loramux.server.settings import Settings

#: Of what base, pool and slots leave, the share that the cache and a step may take. The rest is for
#: fragments, and on a CPU for other programs. The engine checks its cache against the same shares.
SHARE = {"cuda": 0.9, "cpu": 0.6}

#: Kernels, workspaces and handles of CUDA libraries, and interpreter, tokenizer and buffers on the host.
OVERHEAD = {"cuda": 384 * 2**20, "cpu": 128 * 2**20}

#: Less cache than this, or than one context if that is shorter, is not worth starting for.
LEAST_KV_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is to be held, measured from files and configs.

    Attributes:
        experts: of each expert, the stacks that it will be.
        router_bytes: files of the router and its encoder.
        sparse: of each sparse model, how many numbers it has.
    """

    blueprint: Blueprint
    shapes: BaseShapes
    experts: Mapping[str, Sequence[StackShape]]
    router_bytes: int
    sparse: Mapping[str, SparseSize] = field(default_factory=dict)

    def rank(self, expert: str) -> int:
        return max((stack.rank for stack in self.experts[expert]), default=0)

    def pool_bytes(self, dtype: torch.dtype | None, *, pinned: bool) -> int:
        """The host tier, in the type of the files or another. Pinned memory is handed out in powers of
        two."""
        tensors = (
            size for stacks in self.experts.values() for stack in stacks for size in stack.tensor_bytes(dtype)
        )
        return sum(1 << (size - 1).bit_length() if pinned else size for size in tensors)

    def sparse_bytes(self, dtype: torch.dtype) -> int:
        """The sparse models on the device."""
        return sum(size.nbytes(dtype) for size in self.sparse.values())


@dataclass(frozen=True, slots=True)
class Wish:
    """What the settings ask for. `kv_tokens` is None where they leave it to what remains."""

    dtype: torch.dtype
    quantization: str
    kinds: Kinds | None
    slot_bytes: int
    kv_tokens: int | None
    step_tokens: int
    running: int
    later_sparse: int
    captured: bool


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes of everything, within what there is."""

    device: Room
    host: Room | None
    base: int
    pool: int
    sparse: int
    slots: int
    kv: int
    step: int
    graphs: int
    router: int
    rows: int
    kv_tokens: int
    details: Mapping[str, str]

    def table(self) -> str:
        """Few short lines for a person: what takes how much of which memory."""
        on_device = ("base", "sparse", "slots", "kv", "step", "graphs")
        on_host = ("pool", "router")
        if self.host is None:
            names = ("base", "pool", "sparse", "slots", "kv", "step", "router")
            return "\n".join(self._lines(self.device, names))
        return "\n".join([*self._lines(self.device, on_device), *self._lines(self.host, on_host)])

    def _lines(self, room: Room, names: Iterable[str]) -> list[str]:
        sizes = {name: int(getattr(self, name)) for name in names}
        sizes = {name: size for name, size in sizes.items() if size or name not in ("sparse", "graphs")}
        lines = [f"{room.name}: {size_text(room.free)} available"]
        lines += [f"  {n:<7}{size_text(size):>11}  {self.details[n]}".rstrip() for n, size in sizes.items()]
        lines.append(f"  {'left':<7}{size_text(room.free - sum(sizes.values())):>11}")
        return lines


def plan_budget(settings: Settings, target: Target, sizes: Sizes, device: Room, host: Room) -> Budget:
    """Share out the memory.

    Args:
        device: what is free where the base goes; on a CPU the same as `host`.
        host: what is free on the machine.

    Raises:
        StartError: it does not fit. One line with the numbers and the settings that would make it fit.
    """
    planner = _Planner(settings, target, sizes, device, host)
    wish = planner.wish()
    deficit = planner.deficit(wish)
    if deficit > 0:
        raise StartError(planner.refusal(wish, deficit))
    planner.check_host(wish)
    return planner.budget(wish)


@dataclass(frozen=True)
class _Planner:
    settings: Settings
    target: Target
    sizes: Sizes
    device: Room
    host: Room

    @property
    def one_memory(self) -> bool:
        return self.target.device.type == "cpu"

    @property
    def smallest(self) -> str:
        """The quantization that takes least."""
        return "int4" if self.one_memory else "nf4"

    @property
    def share(self) -> float:
        return SHARE[self.target.device.type]

    def wish(self) -> Wish:
        """What the settings ask for; the arena is not made larger than all experts can use.

        Raises:
            StartError: residency.bytes has no room for the largest expert.
        """
        unit = self.unit(self.target.dtype)
        ranks = [self.sizes.rank(expert) for expert in self.sizes.experts]
        largest = max(ranks, default=1)
        allowed = self.settings.residency.bytes
        if allowed < largest * unit:
            raise StartError(
                f"residency.bytes is {allowed}; the largest expert alone needs {largest * unit}, "
                f"all of them {sum(ranks) * unit}"
            )
        # Room for every expert, as much again for merges, and for experts loaded later.
        rows = max(min(allowed // unit, 2 * sum(ranks) + 16 * largest), self.settings.residency.rows)
        if rows * unit > allowed:
            raise StartError(
                f"residency.rows is {rows}, which needs {rows * unit} bytes; residency.bytes is {allowed}"
            )
        engine = self.settings.engine
        return Wish(
            dtype=self.target.dtype,
            quantization=self.target.quantization,
            kinds=self.target.kinds,
            slot_bytes=rows * unit,
            kv_tokens=engine.kv_tokens,
            step_tokens=engine.max_batch_tokens,
            running=engine.max_running,
            later_sparse=self.settings.residency.sparse_bytes,
            captured=not self.one_memory and engine.cuda_graphs == "auto",
        )

    def unit(self, dtype: torch.dtype) -> int:
        return row_bytes(self.sizes.shapes, dtype)

    def base(self, wish: Wish) -> int:
        return self.sizes.blueprint.weight_bytes(wish.dtype, wish.quantization, wish.kinds)

    def pool(self, wish: Wish) -> int:
        held = replace(self.target, dtype=wish.dtype).host_dtype
        return self.sizes.pool_bytes(held, pinned=not self.one_memory)

    def sparse(self, wish: Wish) -> int:
        """The sparse models of the pool, with room for later ones and for arrow."""
        return self.sizes.sparse_bytes(wish.dtype) + wish.later_sparse

    def remaining(self, wish: Wish) -> int:
        """What base, sparse models, slots and, in one memory, pool and router leave."""
        taken = self.base(wish) + wish.slot_bytes + OVERHEAD[self.target.device.type]
        taken += self.sparse(wish) + self.graphs(wish)
        if self.one_memory:
            taken += self.pool(wish) + self.sizes.router_bytes
        return self.device.free - taken

    def step(self, wish: Wish) -> int:
        return self.sizes.blueprint.step_bytes(wish.dtype, wish.step_tokens, wish.running)

    def graphs(self, wish: Wish) -> int:
        """What captured decode steps keep for themselves: activations, logits and what drawing from them
        takes.

        Three times a step of one token a sequence; 144 and 204 MiB were measured for 32 sequences of a base
        of 1 B and of 8 B, for which this says 195 and 201.
        """
        if not wish.captured:
            return 0
        return 3 * self.sizes.blueprint.step_bytes(wish.dtype, wish.running, wish.running)

    def gathered(self, wish: Wish, tokens: int) -> int:
        """What attending takes beside a cache of so many tokens."""
        return self.sizes.blueprint.gathered_bytes(wish.dtype, wish.step_tokens, tokens)

    def least_tokens(self, wish: Wish) -> int:
        """The cache that the start depends on: the one asked for, or the least that is of use."""
        return wish.kv_tokens or min(LEAST_KV_TOKENS, self.sizes.blueprint.positions)

    def tokens_that_fit(self, wish: Wish) -> int:
        usable = int(self.remaining(wish) * self.share) - self.step(wish)
        token, longest = self.sizes.blueprint.kv_token_bytes(wish.dtype), self.sizes.blueprint.positions
        # A cache for more than the longest context gathers no more than that.
        most = (usable - self.gathered(wish, longest)) // token
        tokens = most if most >= longest else usable // (token + self.gathered(wish, 1))
        return max(0, (tokens // EngineLimits.page_size - 2) * EngineLimits.page_size)  # two pad

    def deficit(self, wish: Wish) -> int:
        """Bytes that are missing for the least cache; 0 or less when it fits."""
        pages = -(-self.least_tokens(wish) // EngineLimits.page_size) + 2
        tokens = pages * EngineLimits.page_size
        cache = tokens * self.sizes.blueprint.kv_token_bytes(wish.dtype) + self.gathered(wish, tokens)
        needed = cache + self.step(wish)
        return int(needed / self.share) + 1 - self.remaining(wish)

    def refusal(self, wish: Wish, deficit: int) -> str:
        needed = self.device.free + deficit
        least = self.least_tokens(wish)
        kv = least * self.sizes.blueprint.kv_token_bytes(wish.dtype)
        parts = {
            "base": self.base(wish),
            "pool": self.pool(wish) if self.one_memory else 0,
            "sparse": self.sparse(wish),
            "slots": wish.slot_bytes,
            "graphs": self.graphs(wish),
            "kv": kv,
            "step": self.step(wish) + self.gathered(wish, least),
            "router": self.sizes.router_bytes if self.one_memory else 0,
        }
        parts["reserve"] = needed - sum(parts.values())
        listed = " + ".join(f"{name} {size_text(size)}" for name, size in parts.items() if size)
        ways = self.ways_out(wish, deficit)
        advice = (
            f"any one of these makes it fit: {', '.join(ways)}"
            if ways
            else "no one setting makes it fit: lower residency.bytes, engine.kv_tokens, "
            f"engine.max_batch_tokens and engine.max_running, set quantization to {self.smallest}, "
            "or take a smaller base"
        )
        free = f"{size_text(self.device.free)} are free on {self.device.name}"
        return f"{size_text(needed)} of memory are needed, {free} ({listed}); {advice}"

    def ways_out(self, wish: Wish, deficit: int) -> list[str]:
        """Settings of which each alone would make it fit."""
        ways = []
        if wish.kv_tokens is not None and (tokens := self.tokens_that_fit(wish)) >= LEAST_KV_TOKENS:
            ways.append(f"engine.kv_tokens at most {tokens}")
        largest = max((self.sizes.rank(expert) for expert in self.sizes.experts), default=1)
        if wish.slot_bytes - deficit >= largest * self.unit(wish.dtype):
            ways.append(f"residency.bytes at most {wish.slot_bytes - deficit}")
        others = {
            f"quantization: {self.smallest}": self._quantized(wish),
            "dtype: bfloat16": self._narrowed(wish),
            "engine.max_batch_tokens: 64": replace(wish, step_tokens=min(64, wish.step_tokens)),
            "engine.max_running: 4": replace(wish, running=min(4, wish.running)),
            "residency.sparse_bytes: 0": replace(wish, later_sparse=0),
        }
        return ways + [way for way, other in others.items() if self.deficit(other) <= 0]

    def _quantized(self, wish: Wish) -> Wish:
        return replace(wish, quantization=self.smallest, kinds=QUANTIZED.get(self.smallest))

    def _narrowed(self, wish: Wish) -> Wish:
        if wish.dtype != torch.float32:
            return wish
        return replace(wish, dtype=torch.bfloat16, kinds=None, slot_bytes=wish.slot_bytes // 2)

    def check_host(self, wish: Wish) -> None:
        """Beside a GPU, the pool must fit into the machine's own memory.

        Raises:
            StartError: it does not.
        """
        needed = self.pool(wish) + self.sizes.router_bytes + OVERHEAD["cpu"]
        if not self.one_memory and needed > self.host.free:
            raise StartError(
                f"the pool's {len(self.sizes.experts)} experts and the router need {size_text(needed)} of "
                f"{self.host.name}, {size_text(self.host.free)} are free; serve a pool with fewer experts"
            )

    def budget(self, wish: Wish) -> Budget:
        blueprint = self.sizes.blueprint
        tokens = wish.kv_tokens or min(wish.running * blueprint.positions, self.tokens_that_fit(wish))
        rows = wish.slot_bytes // self.unit(wish.dtype)
        kind = wish.quantization
        if kind == "none":
            kind = self.target.dtype_name if wish.kinds in (None, FULL) else str(wish.kinds.linear)
            if wish.kinds is not None and wish.kinds.given:
                kind = "as they lie in the file"
        return Budget(
            device=self.device,
            host=None if self.one_memory else self.host,
            base=self.base(wish),
            pool=self.pool(wish),
            sparse=self.sparse(wish),
            slots=wish.slot_bytes,
            kv=tokens * blueprint.kv_token_bytes(wish.dtype),
            step=self.step(wish) + self.gathered(wish, tokens),
            graphs=self.graphs(wish),
            router=self.sizes.router_bytes,
            rows=rows,
            kv_tokens=tokens,
            details={
                "base": f"{blueprint.parameters / 1e6:,.1f} M parameters, {kind}",
                "pool": f"{len(self.sizes.experts)} experts in memory of the host",
                "sparse": f"{len(self.sizes.sparse)} sparse models, {size_text(wish.later_sparse)} for more",
                "slots": f"{rows} rows of adapters",
                "kv": f"{tokens} tokens",
                "step": f"{wish.step_tokens} tokens a step",
                "graphs": f"decode steps of up to {wish.running} sequences",
                "router": "",
            },
        )


def router_bytes(pool: Pool, encoder: str | None) -> int:
    """Bytes of the router's tensors, with those of an encoder that lies elsewhere (none if it is not found:
    loading it says why)."""
    folders = [pool.router_dir]
    location = encoder or encoder_elsewhere(pool.router_dir)
    if location is not None:
        with contextlib.suppress(RouterError):
            folders.append(EncoderPlace.find(location).folder)
    return sum(file.stat().st_size for folder in folders for file in folder.rglob("*.safetensors"))


def size_text(size: int) -> str:
    """`1.5 GiB`, for people."""
    value, units = float(size), ["B", "KiB", "MiB", "GiB"]
    while abs(value) >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"
