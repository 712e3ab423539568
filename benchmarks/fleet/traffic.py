"""Requests as arrays: when, which blend, of which session, how long."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Traffic:
    """Requests in the order of their arrival [n].

    `experts` [n, parts] are the experts of a request's blend, all different.
    """

    at: Numbers
    blend: Ints
    session: Ints
    experts: Ints
    prompt: Ints
    answer: Ints

    def __len__(self) -> int:
        return len(self.at)


@dataclass(frozen=True, slots=True)
class Demand:
    """What is asked for.

    Attributes:
        blends, exponent: blends there are, and the exponent of Zipf's law by which they are asked for.
        experts, parts: experts there are, and how many are in a blend.
        expert_exponent: of Zipf's law by which a blend has its first expert; the others are of the same
            domain, which has `domain` experts.
        turns, same: requests of a session on average, and the share of them that keep the session's blend.
        prompt, answer: tokens on average; both are geometric, and at least 1.
    """

    blends: int = 1_000_000
    exponent: float = 1.0
    experts: int = 10_000
    parts: int = 3
    expert_exponent: float = 0.6
    domain: int = 20
    turns: float = 4.0
    same: float = 0.7
    prompt: float = 256.0
    answer: float = 128.0


def zipf(count: int, exponent: float, size: int, generator: np.random.Generator) -> Ints:
    """Numbers below `count`, number n as often as (n + 1) ** -exponent says."""
    shares = np.cumsum(np.arange(1, count + 1, dtype=np.float64) ** -exponent)
    found: Ints = np.searchsorted(shares, generator.random(size) * shares[-1], side="right").astype(np.int64)
    return found


def make(demand: Demand, rate: float, seconds: float, seed: int) -> Traffic:
    """Poisson arrivals of `rate` requests a second."""
    generator = np.random.default_rng(seed)
    count = int(rate * seconds)
    at = np.cumsum(generator.exponential(1 / rate, count))
    # A session begins with probability 1 / turns; else one of the sessions of late goes on.
    begins = generator.random(count) < 1 / demand.turns
    begins[0] = True
    born = np.cumsum(begins) - 1
    back = generator.geometric(1 / max(2.0, rate * 5.0 / demand.turns), count) - 1
    session = np.where(begins, born, np.maximum(born - back, 0))
    own = zipf(demand.blends, demand.exponent, int(born[-1]) + 1, generator)
    fresh = zipf(demand.blends, demand.exponent, count, generator)
    blend = np.where(generator.random(count) < demand.same, own[session], fresh)
    return Traffic(
        at=at,
        blend=blend,
        session=session,
        experts=experts_of(demand, blend, seed),
        prompt=generator.geometric(1 / demand.prompt, count),
        answer=generator.geometric(1 / demand.answer, count),
    )


def experts_of(demand: Demand, blends: Ints, seed: int) -> Ints:
    """The experts of blends [n] -> [n, parts], the same for a blend whenever it is asked for."""
    generator = np.random.default_rng([seed, 1])
    first = zipf(demand.experts, demand.expert_exponent, demand.blends, generator)[blends]
    steps = np.stack([generator.permutation(demand.domain - 1)[: demand.parts - 1] + 1 for _ in range(4096)])
    others = steps[blends % 4096]  # [n, parts - 1] different distances within the domain
    domain = first // demand.domain * demand.domain
    inside = (first - domain)[:, None] + others
    members = np.minimum(demand.domain, demand.experts - domain)[:, None]
    return np.concatenate([first[:, None], domain[:, None] + inside % members], axis=1)
