"""The section `sampling` of the settings: how tokens are drawn where a request does not say."""

from collections.abc import Mapping
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from loramux.server.engine.protocol import LEAST_TEMPERATURE
from loramux.server.section import Section

Asked = TypeVar("Asked", bound=BaseModel)


def _divides(value: float) -> float:
    if 0 < value < LEAST_TEMPERATURE:
        raise ValueError(f"must be 0, or at least {LEAST_TEMPERATURE:.5f}: less cannot divide")
    return value


Temperature = Annotated[float, Field(ge=0, le=2), AfterValidator(_divides)]
TopP = Annotated[float, Field(gt=0, le=1)]
TopK = Annotated[int, Field(ge=-1, le=2**31 - 1)]
MinP = Annotated[float, Field(ge=0, le=1)]
RepetitionPenalty = Annotated[float, Field(ge=0.01, le=100)]


class SamplingSettings(Section):
    """What requests get that leave these fields out. `pool.json` has the same names under `sampling`."""

    temperature: Temperature | None = Field(
        default=None, description="`temperature` of requests without one; unset: the pool's, else 1."
    )
    top_p: TopP | None = Field(
        default=None, description="`top_p` of requests without one; unset: the pool's, else 1."
    )
    top_k: TopK | None = Field(
        default=None, description="`top_k` of requests without one; unset: the pool's, else 0."
    )
    min_p: MinP | None = Field(
        default=None, description="`min_p` of requests without one; unset: the pool's, else 0."
    )
    repetition_penalty: RepetitionPenalty | None = Field(
        default=None, description="`repetition_penalty` of requests without one; unset: the pool's, else 1."
    )

    def over(self, pool: Mapping[str, int | float]) -> "SamplingSettings":
        """These, and where they are unset those of a pool."""
        return SamplingSettings(**{**pool, **self.model_dump(exclude_none=True)})

    def fill(self, request: Asked) -> Asked:
        """The request with what it leaves out."""
        missing = self.model_dump(exclude_none=True, exclude=request.model_fields_set)
        return request.model_copy(update=missing)


def check_sampling(given: dict[str, int | float]) -> dict[str, int | float]:
    """For a field of a model.

    Raises:
        ValueError: names a key that `SamplingSettings` has not, or whose value is out of its range.
    """
    try:
        SamplingSettings.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{first['loc'][0]}: {first['msg']}") from None
    return given
