"""Which published method a sparse model is of; light, so that a pool's manifest is read without torch."""

from enum import StrEnum


class Kind(StrEnum):
    """The published methods that can be served."""

    MIXLORA = "mixlora"
    LORACOE = "loracoe"
    LORAMOE = "loramoe"
    MOLA = "mola"
