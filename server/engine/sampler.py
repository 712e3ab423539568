"""From logits to the next tokens of a batch, every row with its own parameters and its own random numbers."""

from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loramux.kernels.truncation import truncation_bound
from loramux.server.engine.protocol import Sampling, TokenScore
from loramux.server.engine.scheduler import Chunk
from loramux.server.engine.sequence import Sequence

# Below this a temperature is the limit towards 0: in float32 it would underflow, or its quotients overflow.
LEAST_TEMPERATURE = 1e-5
# What a row gets whose distribution is not finite.
NOT_FINITE = -1


def is_greedy(sampling: Sampling) -> bool:
    """Whether the next token is the likeliest one."""
    return sampling.temperature < LEAST_TEMPERATURE


def changes_logits(sampling: Sampling) -> bool:
    """Whether penalties or a bias apply."""
    s = sampling
    return bool(s.logit_bias or s.presence_penalty or s.frequency_penalty or s.repetition_penalty != 1.0)


def uniforms(seeds: Items[int], positions: Items[int]) -> NDArray[np.float64]:
    """One number in [0, 1) for each (seed, position) and nothing else, so that a seeded row draws the same
    tokens alone and in any batch: two rounds of splitmix64 (Steele, Lea, Flood, 2014)."""
    state = np.array([seed & (2**64 - 1) for seed in seeds], dtype=np.uint64)
    mixed = _splitmix(_splitmix(state) + np.asarray(positions, dtype=np.uint64))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _splitmix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True, eq=False, slots=True)
class Draws:
    """The parameters of some rows that are drawn, a column [rows, 1] each.

    Attributes:
        top_k: int64, the size of the vocabulary where it is off.
        floored: whether any row has min-p; truncated: top-k or top-p.
    """

    temperature: Tensor
    min_p: Tensor
    top_k: Tensor
    top_p: Tensor
    floored: bool
    truncated: bool

    @classmethod
    def of(cls, samplings: Items[Sampling], vocabulary: int, device: torch.device) -> "Draws":
        """The parameters of these rows."""
        top_k = [s.top_k if 0 < s.top_k < vocabulary else vocabulary for s in samplings]
        values = torch.tensor([[s.temperature, s.min_p, s.top_p] for s in samplings]).to(device)
        return cls(
            values[:, 0:1],
            values[:, 1:2],
            torch.tensor(top_k, device=device).unsqueeze(-1),
            values[:, 2:3],
            floored=any(s.min_p > 0 for s in samplings),
            truncated=any(s.top_p < 1 for s in samplings) or min(top_k) < vocabulary,
        )


def draw(logits: Tensor, draws: Draws, uniform: Tensor) -> Tensor:
    """Draw a token for each row: temperature, then min-p, top-k and top-p, each on what is left.

    A draw inverts the cumulative distribution in the order of the token ids, so that the last bits of the
    logits, which do depend on the batch, practically never decide. Tokens as likely as the last one that is
    kept are kept too.

    Args:
        logits: float32 [rows, vocabulary], which stay as they are.
        uniform: float64 [rows], in [0, 1).

    Returns:
        int64 [rows]; `NOT_FINITE` where the distribution is not.
    """
    cumulative = kept_weights(logits, draws).cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, uniform.unsqueeze(-1) * total, right=True).squeeze(-1)
    tokens = tokens.clamp_(max=logits.shape[-1] - 1)
    return torch.where(total.squeeze(-1).isfinite(), tokens, NOT_FINITE)


def kept_weights(logits: Tensor, draws: Draws) -> Tensor:
    """What the probabilities of the next tokens are proportional to, float32 [rows, vocabulary]; the largest
    is 1."""
    weights = logits - logits.amax(dim=-1, keepdim=True)
    weights.div_(draws.temperature).exp_()
    if draws.floored:
        weights.masked_fill_(weights < draws.min_p, 0.0)
    if draws.truncated:
        weights.masked_fill_(weights < truncation_bound(weights, draws.top_k, draws.top_p), 0.0)
    return weights


class Sampler:
    """Chooses the next tokens of a step."""

    def __init__(self) -> None:
        self._key: tuple[int, ...] = ()
        self._draws: Draws | None = None
        self._kept: Items[Sequence] = ()

    def choose(
        self, logits: Tensor, sequences: Items[Sequence], best: Tensor | None = None
    ) -> list[TokenScore | None]:
        """A token for each sequence.

        Args:
            logits: float32 [sequences, vocabulary], which stay as they are.
            best: int64 [sequences], their argmax, where it is known.

        Returns:
            One score a sequence, with log-probabilities for those that ask; `None` where the distribution is
            not finite.
        """
        settings = [sequence.work.sampling for sequence in sequences]
        scores, adjusted = logits, [i for i, s in enumerate(settings) if changes_logits(s)]
        if adjusted:
            scores = logits.clone()
            for row in adjusted:
                adjust_(scores[row], sequences[row])
        tokens = scores.argmax(dim=-1) if best is None or adjusted else best
        drawn = [i for i, s in enumerate(settings) if not is_greedy(s)]
        if drawn:
            draws = self._parameters([sequences[i] for i in drawn], logits)
            numbers = uniforms([sequences[i].seed for i in drawn], [sequences[i].generated for i in drawn])
            uniform = torch.from_numpy(numbers).to(logits.device)
            if len(drawn) == len(sequences):
                tokens = draw(scores, draws, uniform)
            else:
                rows = torch.tensor(drawn, device=logits.device)
                tokens = tokens.clone()
                tokens[rows] = draw(scores[rows], draws, uniform)
        chosen = tokens.tolist()
        return [
            None if token == NOT_FINITE else token_score(row, token, s.logprobs)
            for row, token, s in zip(logits, chosen, settings, strict=True)
        ]

    def _parameters(self, sequences: Items[Sequence], logits: Tensor) -> Draws:
        """Those of the last step, if it had the same sequences."""
        key = tuple(id(sequence.work) for sequence in sequences)
        if self._draws is None or key != self._key:
            samplings = [sequence.work.sampling for sequence in sequences]
            self._draws = Draws.of(samplings, logits.shape[-1], logits.device)
            self._key, self._kept = key, sequences  # kept alive, so that an id in the key cannot be reused
        return self._draws


def adjust_(logits: Tensor, sequence: Sequence) -> None:
    """Repetition penalty over prompt and answer, presence and frequency over the answer, then the bias;
    logits [vocabulary], changed in place."""
    s = sequence.work.sampling
    device = logits.device
    if s.repetition_penalty != 1.0:
        ids = torch.tensor(sorted(set(sequence.tokens)), device=device)
        values = logits[ids]
        penalty = s.repetition_penalty
        logits[ids] = torch.where(values > 0, values / penalty, values * penalty)
    if sequence.counts and (s.presence_penalty or s.frequency_penalty):
        ids = torch.tensor(list(sequence.counts), device=device)
        counts = torch.tensor(list(sequence.counts.values()), device=device, dtype=logits.dtype)
        logits[ids] -= s.presence_penalty + s.frequency_penalty * counts
    if s.logit_bias:
        ids = torch.tensor(list(s.logit_bias), device=device)
        logits[ids] += torch.tensor(list(s.logit_bias.values()), device=device, dtype=logits.dtype)


def token_score(logits: Tensor, token: int, alternatives: int | None) -> TokenScore:
    """The natural-log probability of `token` under `logits` [vocabulary], and of the likeliest others."""
    if alternatives is None:
        return TokenScore(token)
    logprobs = logits.log_softmax(dim=-1)
    top: tuple[tuple[int, float], ...] = ()
    if alternatives:
        best = logprobs.topk(min(alternatives, logprobs.numel()))
        top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenScore(token, float(logprobs[token]), top)


def prompt_scores(logits: Tensor, chunk: Chunk) -> list[TokenScore]:
    """Scores of the prompt tokens that follow those of a chunk, as far as they are not known yet.

    Args:
        logits: float32 [tokens of the chunk, vocabulary].
    """
    sequence = chunk.sequence
    first = max(0, len(sequence.prompt_scores) - chunk.start - 1)
    targets = sequence.work.prompt[chunk.start + 1 + first : chunk.start + chunk.length + 1]
    rows = logits[first : first + len(targets)]
    return [
        token_score(row, token, sequence.work.prompt_logprobs or 0)
        for row, token in zip(rows, targets, strict=True)
    ]
