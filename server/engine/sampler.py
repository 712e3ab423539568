"""From logits to the next token of one sequence, with its own parameters and its own random numbers."""

import secrets
from collections import Counter

import torch
from torch import Tensor

from loramux.server.engine.protocol import Sampling, TokenScore

# Below this a temperature is the limit towards 0: in float32 it would underflow, or its quotients overflow.
LEAST_TEMPERATURE = 1e-5


class Sampler:
    """The sampling state of one sequence.

    A seeded sampler draws the same tokens alone and in a batch: its random numbers depend on the seed and the
    position only, and a draw inverts the cumulative distribution in the order of the token ids, so that the
    last bits of the logits, which do depend on the batch, practically never decide.
    """

    def __init__(self, sampling: Sampling, prompt: tuple[int, ...]) -> None:
        self.sampling = sampling
        self._counts: Counter[int] = Counter()
        self._seen: set[int] = set(prompt) if sampling.repetition_penalty != 1.0 else set()
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self._random = torch.Generator().manual_seed(seed)

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the next token is the argmax of the logits and nothing more is asked."""
        s = self.sampling
        return self._greedy and s.logprobs is None and not self._changes_logits

    @property
    def _greedy(self) -> bool:
        return self.sampling.temperature < LEAST_TEMPERATURE

    @property
    def _changes_logits(self) -> bool:
        s = self.sampling
        return bool(s.logit_bias or s.presence_penalty or s.frequency_penalty or s.repetition_penalty != 1.0)

    def sample(self, logits: Tensor) -> TokenScore:
        """Choose the next token from float32 `logits` of shape [vocabulary], which stay as they are."""
        scores = self._adjusted(logits) if self._changes_logits else logits
        if self._greedy:
            token = int(scores.argmax())
        else:
            token = self._draw(next_token_distribution(scores, self.sampling))
        return token_score(logits, token, self.sampling.logprobs)

    def accept(self, token: int) -> None:
        """Count a token that became part of the answer."""
        self._counts[token] += 1
        if self.sampling.repetition_penalty != 1.0:
            self._seen.add(token)

    def _adjusted(self, logits: Tensor) -> Tensor:
        """Repetition penalty over prompt and answer, presence and frequency over the answer, then the
        bias."""
        s = self.sampling
        logits = logits.clone()
        device = logits.device
        if self._seen:
            ids = torch.tensor(sorted(self._seen), device=device)
            values = logits[ids]
            penalty = s.repetition_penalty
            logits[ids] = torch.where(values > 0, values / penalty, values * penalty)
        if self._counts and (s.presence_penalty or s.frequency_penalty):
            ids = torch.tensor(list(self._counts), device=device)
            counts = torch.tensor(list(self._counts.values()), device=device, dtype=logits.dtype)
            logits[ids] -= s.presence_penalty + s.frequency_penalty * counts
        if s.logit_bias:
            ids = torch.tensor(list(s.logit_bias), device=device)
            logits[ids] += torch.tensor(list(s.logit_bias.values()), device=device, dtype=logits.dtype)
        return logits

    def _draw(self, distribution: Tensor) -> int:
        cumulative = distribution.cumsum(dim=-1)
        if not torch.isfinite(cumulative[-1]):
            raise FloatingPointError("the distribution of the next token is not finite")
        uniform = torch.rand((), generator=self._random, dtype=torch.float64).to(cumulative.device)
        token = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
        return min(token, cumulative.numel() - 1)


def next_token_distribution(scores: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities, float64 [vocabulary]: temperature, then min-p, top-k and top-p, each on what is left."""
    scores = (scores - scores.max()) / sampling.temperature
    if sampling.min_p > 0:
        scores = scores.masked_fill(scores.exp() < sampling.min_p, float("-inf"))
    if 0 < sampling.top_k < scores.numel():
        scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[-1], float("-inf"))
    if sampling.top_p < 1:
        scores = _nucleus(scores, sampling.top_p)
    return scores.softmax(dim=-1, dtype=torch.float64)


def _nucleus(scores: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of most likely tokens whose probability reaches `top_p`, at least one."""
    probabilities, order = scores.softmax(dim=-1).sort(descending=True)
    before = probabilities.cumsum(dim=-1) - probabilities
    dropped = order[before >= top_p]
    dropped = dropped[dropped != order[0]]
    return scores.index_fill(0, dropped, float("-inf"))


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
