"""What a sparse model is once it has been read, whatever its files looked like."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

from torch import Tensor

from loramux.adapters.lora import LoraPair
from loramux.adapters.sparse.kind import Kind as Kind


class FfnStrategy(StrEnum):
    """How a MixLoRA router spends a token."""

    TOP_K = "top_k"
    TOP_P = "top_p"
    SWITCH = "switch"


@dataclass(frozen=True, eq=False)
class ExpertFactors:
    """The factors of all experts of one projection: delta W_e = scale * b[e] @ a[e].

    Attributes:
        a: `[experts, rank, in]`.
        b: `[experts, out, rank]`.
    """

    a: Tensor
    b: Tensor
    scale: float

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes

    @property
    def experts(self) -> int:
        return self.a.shape[0]

    @property
    def rank(self) -> int:
        return self.a.shape[1]


@dataclass(frozen=True, eq=False)
class RankMixture:
    """LoRACoE at one linear module: y += scale * gain * B(g ⊙ Ax), g = mean_i softmax(W_i x / temperature).

    The softmax is over the rank.

    Attributes:
        a: `[rank, in]`.
        b: `[out, rank]`.
        router: `[experts * rank, in]` float32, row i * rank + j for expert i and rank j; `None` for a
            checkpoint without one (warm-up only), whose gate is `bypass` for every rank.
        gain: `gate_gain` resolved to a number: 1, the rank, or what the file says.
        bypass: the gate of a checkpoint without a router: 1 / rank for `uniform`, 1 for `ones`.
    """

    a: Tensor
    b: Tensor
    scale: float
    router: Tensor | None
    experts: int
    temperature: float = 1.0
    gain: float = 1.0
    bypass: float = 1.0

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes + (0 if self.router is None else self.router.nbytes)


@dataclass(frozen=True, eq=False)
class ExpertMixture:
    """LoRAMoE and MoLA at one linear module: y += Σ_e g_e scale B_e A_e x, g = softmax(W x).

    Attributes:
        router: `[experts, in]` float32.
        top_k: `None` keeps all experts (LoRAMoE); a number keeps that many and renormalises (MoLA).
    """

    factors: ExpertFactors
    router: Tensor
    top_k: int | None = None

    @property
    def nbytes(self) -> int:
        return self.factors.nbytes + self.router.nbytes


@dataclass(frozen=True)
class FfnRouting:
    """The parameters of a MixLoRA router at serving.

    Attributes:
        temperature: top-p only; 0 is off.
        capacity: switch only: tokens an expert takes per sequence; `None` never drops any.
    """

    strategy: FfnStrategy
    top_k: int = 2
    top_p: float = 0.8
    temperature: float = 0.0
    capacity: int | None = None


@dataclass(frozen=True, eq=False)
class MixtureFfn:
    """MixLoRA at one feed-forward block: y = Σ_e w_e FFN_e(x).

    Attributes:
        router: `[experts, hidden]` float32.
        projections: name of a linear inside the block (`gate_proj`, `up_proj`, `down_proj`; `fc1`, `fc2`;
            `gate_up_proj`, `down_proj`) -> its experts. A projection that is missing has no delta.
        activation: what the experts were trained with, by its name in transformers; `None` is the base's own.
    """

    router: Tensor
    projections: Mapping[str, ExpertFactors]
    routing: FfnRouting
    activation: str | None = None

    @property
    def nbytes(self) -> int:
        return self.router.nbytes + sum(factors.nbytes for factors in self.projections.values())

    @property
    def experts(self) -> int:
        return self.router.shape[0]


@dataclass(frozen=True, eq=False)
class SparseModel:
    """One sparse model in memory, on the host.

    Attributes:
        id: what `model` calls it.
        content_hash: sha256 over everything that changes what it says, `sha256:` first.
        plain: module path -> an ordinary LoRA that every token uses (attention of MixLoRA).
        linear: module path -> a mixture that adds its deltas at that linear module.
        ffn: path of a feed-forward block (`model.layers.0.mlp`) -> the mixture that replaces it.
        summary: what `/v1/models` says of it: experts, rank, top_k and the like.
    """

    id: str
    kind: Kind
    content_hash: str
    plain: Mapping[str, LoraPair] = field(default_factory=lambda: MappingProxyType({}))
    linear: Mapping[str, RankMixture | ExpertMixture] = field(default_factory=lambda: MappingProxyType({}))
    ffn: Mapping[str, MixtureFfn] = field(default_factory=lambda: MappingProxyType({}))
    summary: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors, here and on the device."""
        plain = sum(pair.a.nbytes + pair.b.nbytes for pair in self.plain.values())
        return plain + sum(mixture.nbytes for mixture in (*self.linear.values(), *self.ffn.values()))
