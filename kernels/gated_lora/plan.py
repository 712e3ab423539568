"""Which tokens of a batch use which rows of the stacked factors: decided once a step, used by every layer."""

from collections.abc import Sequence
from dataclasses import dataclass

from loramux.kernels.gated_lora.gate_slot import GateSlot
from loramux.kernels.gated_lora.shares import Share, TokenSlot, share_out
from loramux.kernels.gated_lora.slots import UnionTable

#: From this many tokens on, a request gets matrix products of its own over the rows it uses; shorter ones are
#: taken together.
LONG_SEGMENT = 16


#: What a request of a step may use.
Slot = GateSlot | TokenSlot


@dataclass(frozen=True, eq=False)
class Segment:
    """The packed tokens `start` to `start + length` belong to one request, which uses `slot`."""

    slot: GateSlot
    start: int
    length: int

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.start + self.length)

    @property
    def is_long(self) -> bool:
        return self.length >= LONG_SEGMENT


@dataclass(frozen=True, eq=False)
class Plan:
    """The segments of a step that use blends, and the shares of slots whose gates depend on the token. An
    empty plan is a batch of the bare base.

    A captured step has a `table` in place of segments: it is filled anew before every replay, and every
    module adds what it says, for as many tokens as it has room for.

    Plans are compared by identity: what a layer derives from one stays valid for as long as it is the same
    object.
    """

    segments: tuple[Segment, ...] = ()
    shares: tuple[Share, ...] = ()
    table: UnionTable | None = None

    @property
    def is_empty(self) -> bool:
        return not self.segments and not self.shares and self.table is None

    @property
    def gates_rows(self) -> bool:
        """Whether any token uses rows of the stacked factors."""
        return bool(self.segments) or self.table is not None


BARE = Plan()


def plan_step(segments: Sequence[tuple[Slot | None, int]]) -> Plan:
    """The plan of a packed batch: (slot, number of tokens) of each request in order; `None` is the bare
    base."""
    planned: list[Segment] = []
    spans: list[tuple[TokenSlot, int, int]] = []
    start = 0
    for slot, length in segments:
        if isinstance(slot, GateSlot):
            planned.append(Segment(slot, start, length))
        elif slot is not None:
            spans.append((slot, start, length))
        start += length
    return Plan(tuple(planned), share_out(spans)) if planned or spans else BARE
