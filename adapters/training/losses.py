"""What routers are taught beside the language: to use all their experts, and to keep their logits small."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot


class RouterLog:
    """The router logits of one forward pass, in the order of the layers.

    Layers write into it while they train; whoever computes the loss takes them out again.
    """

    def __init__(self) -> None:
        self._logits: list[Tensor] = []

    def add(self, logits: Tensor) -> None:
        """Note the logits of one router: `[rows, tokens, experts]` float32."""
        self._logits.append(logits)

    def take(self) -> list[Tensor]:
        """The logits noted since the last call."""
        taken, self._logits = self._logits, []
        return taken


def real_tokens(logits: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Logits of all layers one below the other, padding left out: `[layers * tokens, experts]`.

    Args:
        logits: one `[rows, width, experts]` per router.
        mask: `[rows, width]`, true for real tokens.
    """
    return torch.cat([layer[mask] for layer in logits])


def top_k_balance(logits: Tensor, top_k: int) -> Tensor:
    """E · Σ_j Σ_e f_je P_e: `top_k` for perfect balance, up to E when all tokens use the same experts.

    f_je is the share of tokens whose j-th choice is expert e, P_e the mean probability of expert e (MixLoRA
    §3.3; Switch Transformers §2.2 for one choice). Gradients flow through P only.

    Args:
        logits: `[tokens, experts]` float32, all layers together.
        top_k: choices a token makes.
    """
    probabilities = logits.softmax(-1)
    experts = logits.shape[-1]
    chosen = one_hot(probabilities.topk(top_k, dim=-1).indices, experts)  # [tokens, k, experts]
    share = chosen.float().mean(0)  # [k, experts]
    return experts * (share * probabilities.mean(0)).sum()


def switch_balance(logits: Tensor) -> Tensor:
    """E² · mean_e(f_e P_e) for routers that choose one expert: 1 for perfect balance, E for collapse."""
    return top_k_balance(logits, 1)


def z_loss(logits: Tensor) -> Tensor:
    """Mean of logsumexp² over tokens: keeps logits small (ST-MoE §2.2). `[tokens, experts]` -> scalar."""
    return logits.logsumexp(-1).square().mean()


def mass_variation(logits: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Squared coefficient of variation of the routing mass of each router, averaged over routers.

    LoRAMoE's balance loss without its task types: rows carry none, so its (1 ± δ) factors are 1. Zero when
    every expert receives the same total weight, E when one receives all (the unbiased variance is meant).

    Args:
        logits: one `[rows, width, experts]` per router.
        mask: `[rows, width]`, true for real tokens.
    """
    mass = torch.stack([layer[mask].softmax(-1).sum(0) for layer in logits])  # [routers, experts]
    return (mass.var(-1) / mass.mean(-1).square()).mean()
