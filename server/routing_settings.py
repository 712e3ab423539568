"""The section `routing` of the settings."""

from typing import Literal

from pydantic import Field, field_validator

from loramux.adapters.blend import METHOD_OPTIONS
from loramux.server.section import Section


class RoutingSettings(Section):
    """Defaults of `routing` in a request."""

    strategy: Literal["similarity", "classifier", "hybrid", "arrow", "spectr", "logo"] = Field(
        default="hybrid",
        description="Cosine to the centroids, classifier probability, or their weighted average; or `arrow`, "
        "`spectr` or `logo`, which ask the experts.",
    )
    top_m: int = Field(default=3, ge=1, description="Experts in a routed blend.")
    policy: Literal["proportional", "softmax", "hydra_minmax"] = Field(
        default="softmax", description="How scores become weights."
    )
    temperature: float | None = Field(
        default=None, gt=0, description="Softmax temperature; unset: the pool's calibrated one."
    )
    threshold: float | None = Field(
        default=None,
        description="Best score under which the base answers alone; unset: the pool's calibrated one.",
    )
    merge: str = Field(default="exact", description="Merge method of routed blends.")
    audit_share: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of routed answers whose prompt is scored afterwards under the base, the best "
        "expert and the blend, for `loramux_audit_*`.",
    )

    @field_validator("merge")
    @classmethod
    def _known_method(cls, value: str) -> str:
        if value not in METHOD_OPTIONS:
            raise ValueError(f"must be one of {', '.join(METHOD_OPTIONS)}")
        return value
