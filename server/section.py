"""What every section of the settings has in common."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A group of settings under one name; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)
