"""From logits to the next tokens of a batch, every row with its own parameters and its own random numbers."""

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad, threshold

from loramux.server.engine.masks import Masks
from loramux.server.engine.protocol import LEAST_TEMPERATURE, Sampling, TokenScore
from loramux.server.engine.scheduler import Chunk
from loramux.server.engine.sequence import Sequence

# How often a token is drawn that may prove to lie outside of top-p, before the row is sorted.
ATTEMPTS = 8
# Tokens that are summed first, before the sums are summed.
BLOCK = 256
# What a row gets whose distribution is not finite.
NOT_FINITE = -1
# What a row gets for which a captured draw did not find a token.
UNSETTLED = -2
# How many tokens a captured draw tries at once.
TRIES = 2

#: A captured draw: parameters float32 [rows, 3] and uniform float64 [rows, TRIES] in, tokens int64 [rows]
#: out.
CapturedDraw = Callable[[NDArray[np.float32], NDArray[np.float64]], Tensor]


def is_greedy(sampling: Sampling) -> bool:
    """Whether the next token is the likeliest one."""
    return sampling.temperature < LEAST_TEMPERATURE


def changes_logits(sampling: Sampling) -> bool:
    """Whether penalties or a bias apply."""
    s = sampling
    return bool(s.logit_bias or s.presence_penalty or s.frequency_penalty or s.repetition_penalty != 1.0)


def uniforms(seeds: Items[int], positions: Items[int]) -> NDArray[np.float64]:
    """`ATTEMPTS` numbers in [0, 1) for each (seed, position), of nothing else, so that a seeded row draws the
    same tokens alone and in any batch; float64 [rows, ATTEMPTS]. Rounds of splitmix64 (Steele, Lea, Flood,
    2014)."""
    state = np.array([seed & (2**64 - 1) for seed in seeds], dtype=np.uint64)
    mixed = _splitmix(_splitmix(state) + np.asarray(positions, dtype=np.uint64))
    attempts: NDArray[np.uint64] = np.arange(ATTEMPTS, dtype=np.uint64)
    several = _splitmix(np.add.outer(mixed, attempts))
    return (several >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _splitmix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


#: Logits so far below the highest count for nothing, and what their weights are below.
_LEAST, _NOTHING = -80.0, 2e-35


@dataclass(frozen=True, eq=False, slots=True)
class Draws:
    """The parameters of some rows that are drawn.

    Attributes:
        temperature, min_p, top_p: float32 [rows, 1].
        top_k: int64 [rows, 1], the size of the vocabulary where it is off.
        floored: whether any row has min-p.
        limited: the rows that have top-k; nucleus: those that have top-p alone; `None` where there are none.
    """

    temperature: Tensor
    min_p: Tensor
    top_k: Tensor
    top_p: Tensor
    floored: bool
    limited: Tensor | None
    nucleus: Tensor | None

    @classmethod
    def of(cls, samplings: Items[Sampling], vocabulary: int, device: torch.device) -> "Draws":
        """The parameters of these rows."""
        top_k = [s.top_k if 0 < s.top_k < vocabulary else vocabulary for s in samplings]
        values = torch.tensor([[s.temperature, s.min_p, s.top_p] for s in samplings]).to(device)
        limited = [row for row, k in enumerate(top_k) if k < vocabulary]
        nucleus = [row for row, s in enumerate(samplings) if s.top_p < 1 and top_k[row] == vocabulary]
        return cls(
            values[:, 0:1],
            values[:, 1:2],
            torch.tensor(top_k, device=device).unsqueeze(-1),
            values[:, 2:3],
            any(s.min_p > 0 for s in samplings),
            torch.tensor(limited, device=device) if limited else None,
            torch.tensor(nucleus, device=device) if nucleus else None,
        )


def draw(logits: Tensor, draws: Draws, uniform: Tensor) -> Tensor:
    """Draw a token for each row: temperature, then min-p, top-k and top-p, each on what is left.

    A draw inverts the cumulative distribution in the order of the token ids, so that the last bits of the
    logits, which do depend on the batch, practically never decide. Tokens as likely as the last one that is
    kept are kept too. For top-p alone nothing is sorted: a token is drawn from all, and drawn again if what
    is likelier than it has the share already.

    Args:
        logits: float32 [rows, vocabulary], which stay as they are.
        uniform: float64 [rows, ATTEMPTS], in [0, 1).

    Returns:
        int64 [rows]; `NOT_FINITE` where the distribution is not.
    """
    weights = logits - logits.amax(dim=-1, keepdim=True)
    # On a CPU the exponential of minus infinity takes up to four times as long as that of a number.
    weights.div_(draws.temperature).clamp_(min=_LEAST).exp_()
    threshold(weights, _NOTHING, 0.0, inplace=True)
    if draws.floored:
        weights.masked_fill_(weights < draws.min_p, 0.0)
    if draws.limited is not None:
        rows = draws.limited
        weights[rows] = truncated(weights[rows], draws.top_k[rows], draws.top_p[rows])
    sums = Sums.of(weights)
    tokens = sums.invert(uniform[:, :1]).squeeze(-1)
    if draws.nucleus is not None:
        _draw_nucleus_(tokens, sums, draws, uniform)
    return torch.where(sums.total.isfinite(), tokens, NOT_FINITE)


@dataclass(frozen=True, eq=False, slots=True)
class Sums:
    """Cumulative sums of rows in two levels, because one over a whole vocabulary is slow on every device.

    Attributes:
        weights: float32 [rows, blocks, BLOCK], zeros behind the vocabulary.
        blocks: float64 [rows, blocks], the sums up to and including each block.
    """

    weights: Tensor
    blocks: Tensor

    @classmethod
    def of(cls, weights: Tensor) -> "Sums":
        """Of float32 [rows, vocabulary]."""
        if missing := -weights.shape[-1] % BLOCK:
            weights = pad(weights, (0, missing))
        blocks = weights.view(len(weights), -1, BLOCK)
        return cls(blocks, blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1))

    @property
    def total(self) -> Tensor:
        """[rows]"""
        return self.blocks[:, -1]

    def rows(self, chosen: Tensor) -> "Sums":
        """Some of the rows."""
        return Sums(self.weights[chosen], self.blocks[chosen])

    def invert(self, uniform: Tensor) -> Tensor:
        """The first tokens whose cumulative weights are beyond shares of the whole; uniform [rows, tries],
        the result int64 [rows, tries]."""
        target = uniform * self.total.unsqueeze(-1)
        block = torch.searchsorted(self.blocks, target, right=True).clamp_(max=self.blocks.shape[-1] - 1)
        before = torch.where(block > 0, self.blocks.gather(-1, (block - 1).clamp_(min=0)), 0.0)
        within = self.weights.gather(1, block.unsqueeze(-1).expand(-1, -1, BLOCK))  # [rows, tries, BLOCK]
        sums = within.cumsum(dim=-1, dtype=torch.float64)
        # The two levels may differ in their last bits: then it is the block's last token of any weight.
        target = torch.minimum(target - before, sums[..., -1] * (1 - 1e-12))
        return block * BLOCK + (sums <= target.unsqueeze(-1)).sum(dim=-1).clamp_(max=BLOCK - 1)

    def inside(self, tokens: Tensor, top_p: Tensor) -> Tensor:
        """Whether tokens [rows, tries] are in their rows' nucleus, for top-p [rows, 1]."""
        weights = self.weights.flatten(1).unsqueeze(1)
        own = weights.squeeze(1).gather(-1, tokens).unsqueeze(-1)
        above = torch.where(weights > own, weights, 0.0).sum(dim=-1)
        return (above < top_p * self.total.unsqueeze(-1)) | (top_p >= 1)


def draw_captured(logits: Tensor, best: Tensor, parameters: Tensor, uniform: Tensor) -> Tensor:
    """`draw` as far as it goes without asking the host anything, for rows without top-k.

    Args:
        logits: float32 [rows, vocabulary]; best: int64 [rows], their argmax.
        parameters: float32 [rows, 3]: temperature, 0 for the likeliest token; min-p; top-p.
        uniform: float64 [rows, tries].

    Returns:
        int64 [rows]; `NOT_FINITE`, or `UNSETTLED` where every try was outside of top-p.
    """
    temperature, min_p, top_p = (parameters[:, i : i + 1] for i in range(3))
    greedy = temperature == 0
    weights = logits - logits.gather(-1, best.unsqueeze(-1))
    weights.div_(torch.where(greedy, 1.0, temperature)).exp_()
    weights.masked_fill_(weights < min_p, 0.0)
    sums = Sums.of(weights)
    tries = sums.invert(uniform)
    inside = sums.inside(tries, top_p)
    tokens = tries.gather(-1, inside.int().argmax(dim=-1, keepdim=True)).squeeze(-1)
    tokens = torch.where(inside.any(dim=-1), tokens, UNSETTLED)
    tokens = torch.where(sums.total.isfinite(), tokens, NOT_FINITE)
    return torch.where(greedy.squeeze(-1), best, tokens)


def _draw_nucleus_(tokens: Tensor, sums: Sums, draws: Draws, uniform: Tensor) -> None:
    """Draw again, in place, until every token is of its row's nucleus."""
    rows = draws.nucleus
    assert rows is not None  # looked at by the caller
    for attempt in range(ATTEMPTS):
        mine = sums if len(rows) == len(tokens) else sums.rows(rows)
        drawn = mine.invert(uniform[rows, attempt].unsqueeze(-1))
        tokens[rows] = drawn.squeeze(-1)
        rows = rows[~mine.inside(drawn, draws.top_p[rows]).squeeze(-1)]
        if not len(rows):
            return
    rest = sums.rows(rows).weights.flatten(1)
    kept = truncated(rest, draws.top_k[rows], draws.top_p[rows])
    tokens[rows] = Sums.of(kept).invert(uniform[rows, :1]).squeeze(-1)


def truncated(weights: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The weights that top-k and then top-p keep, 0 for the others.

    Top-k keeps the k largest and all that are as large as the last of them. Top-p keeps, of these, the
    largest ones until their sum reaches that share of the whole, at least one, and all that are as large as
    the last.

    Args:
        weights: [rows, vocabulary], not negative.
        top_k: int64 [rows, 1], from 1; the vocabulary's size and more keep all.
        top_p: [rows, 1]; 1 and more keep all.
    """
    count = min(int(top_k.max()), weights.shape[-1])
    ordered = weights.topk(count, dim=-1).values
    last = ordered.gather(-1, top_k.clamp(max=count) - 1)
    share = ordered.double().masked_fill_(ordered < last, 0.0)
    above = share.cumsum(dim=-1)
    kept = (above - share < top_p.double() * above[:, -1:]) & (ordered >= last)
    kept[:, 0] = True
    nucleus = torch.where(kept, ordered, torch.inf).amin(dim=-1, keepdim=True)
    return weights.masked_fill(weights < torch.where(top_p < 1, nucleus, last), 0.0)


class Sampler:
    """Chooses the next tokens of a step."""

    def __init__(self) -> None:
        self._draws: Draws | None = None
        self._drawn: Items[Sequence] = ()

    @torch.inference_mode()
    def choose(
        self,
        logits: Tensor,
        sequences: Items[Sequence],
        best: Tensor | None = None,
        captured: CapturedDraw | None = None,
        masks: Masks | None = None,
    ) -> list[TokenScore | None]:
        """A token for each sequence.

        Args:
            logits: float32 [sequences, vocabulary], which stay as they are where any sequence asks for
                log-probabilities.
            best: int64 [sequences], their argmax, where it is known.
            captured: draws from these logits, where that was captured.
            masks: begun for those sequences that follow a grammar, in their order.

        Returns:
            One score a sequence, with log-probabilities for those that ask; `None` where the distribution is
            not finite.
        """
        settings = [sequence.work.sampling for sequence in sequences]
        drawn = [row for row, s in enumerate(settings) if not is_greedy(s)]
        adjusted = [row for row, s in enumerate(settings) if changes_logits(s)]
        masked = [row for row, one in enumerate(sequences) if masks is not None and one.is_constrained]
        changed = bool(adjusted or masked)
        if captured is not None and drawn and not changed and not any(settings[row].top_k for row in drawn):
            tokens = self._draw_captured(logits, sequences, captured)
        else:
            scores = logits
            if changed:
                scores = logits if all(s.logprobs is None for s in settings) else logits.clone()
                for row in adjusted:
                    adjust_(scores[row], sequences[row])
            if masks is not None and masked:  # after the bias: no wish of a client's goes beyond the grammar
                masks.apply_(scores, masked)
            if drawn and len(drawn) == len(sequences):
                tokens = self._draw(scores, sequences).tolist()
            else:
                found = scores.argmax(dim=-1) if best is None or changed else best
                if drawn:
                    rows = torch.tensor(drawn, device=scores.device)
                    found = found.index_copy(
                        0, rows, self._draw(scores[rows], [sequences[row] for row in drawn])
                    )
                tokens = found.tolist()
        return [
            None
            if token == NOT_FINITE
            else TokenScore(token)
            if s.logprobs is None
            else token_score(logits[row], token, s.logprobs)
            for row, (token, s) in enumerate(zip(tokens, settings, strict=True))
        ]

    def _draw(self, scores: Tensor, sequences: Items[Sequence]) -> Tensor:
        uniform = torch.from_numpy(_numbers(sequences)).to(scores.device)
        return draw(scores, self._parameters(sequences, scores), uniform)

    def _draw_captured(self, logits: Tensor, sequences: Items[Sequence], captured: CapturedDraw) -> list[int]:
        settings = [sequence.work.sampling for sequence in sequences]
        parameters = [(0.0 if is_greedy(s) else s.temperature, s.min_p, s.top_p) for s in settings]
        uniform = _numbers(sequences)
        tokens: list[int] = captured(np.array(parameters, dtype=np.float32), uniform[:, :TRIES]).tolist()
        unsettled = [row for row, token in enumerate(tokens) if token == UNSETTLED]
        if unsettled:
            rows = torch.tensor(unsettled, device=logits.device)
            draws = Draws.of([settings[row] for row in unsettled], logits.shape[-1], logits.device)
            again = draw(logits[rows], draws, torch.from_numpy(uniform[unsettled]).to(logits.device)).tolist()
            for row, token in zip(unsettled, again, strict=True):
                tokens[row] = token
        return tokens

    def _parameters(self, sequences: Items[Sequence], logits: Tensor) -> Draws:
        """Those of the last step, if it had the same sequences."""
        if self._draws is None or sequences != self._drawn:  # sequences compare by identity
            samplings = [sequence.work.sampling for sequence in sequences]
            self._draws = Draws.of(samplings, logits.shape[-1], logits.device)
            self._drawn = list(sequences)
        return self._draws


def _numbers(sequences: Items[Sequence]) -> NDArray[np.float64]:
    return uniforms([one.seed for one in sequences], [one.generated for one in sequences])


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
