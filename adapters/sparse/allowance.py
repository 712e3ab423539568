"""How much of the device sparse models, arrow and spectr may take beside what the budget gave to others."""

from loramux.adapters.errors import BlendError


class Allowance:
    """Bytes that are taken before something is placed and given back after it is gone.

    Args:
        limit: bytes; `None` is without limit.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self.taken = 0

    def has(self, size: int) -> bool:
        """Whether so many bytes are left."""
        return self._limit is None or self.taken + size <= self._limit

    def take(self, size: int, what: str) -> None:
        """Take bytes for `what`.

        Raises:
            BlendError: fewer are left; nothing is taken then.
        """
        if self._limit is not None and not self.has(size):
            left = self._limit - self.taken
            raise BlendError(
                f"{what} takes {size} bytes on the device and {left} of {self._limit} are left; "
                "unload a sparse model, or raise residency.sparse_bytes"
            )
        self.taken += size

    def give(self, size: int) -> None:
        """Give back what was taken."""
        self.taken -= size
