"""What every section of the settings has in common."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A group of settings under one name; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def split(value: object) -> object:
    """A list as the environment writes it: with commas."""
    if isinstance(value, str):
        return tuple(part for part in (piece.strip() for piece in value.split(",")) if part)
    return value
