"""What is said to `server/ray/app.py`, by `loramux deploy ray` or by a config file of Ray Serve."""

from pathlib import Path
from typing import Any

from pydantic import Field

from loramux.server.errors import StartError
from loramux.server.section import Section
from loramux.server.settings import Settings, load_settings


class RayOptions(Section):
    """Arguments of the application. The settings are those of `loramux serve`, of which `replicas` says how
    many engines there are."""

    config: Path | None = Field(default=None, description="YAML file of settings, on every machine.")
    settings: dict[str, Any] = Field(
        default={}, description="Settings, nested; they win over the environment and over `config`."
    )
    cpus: float = Field(default=1, ge=0, description="CPUs that Ray reserves for an engine, and its threads.")
    gpus: float = Field(default=0, ge=0, description="GPUs that Ray reserves for an engine.")
    per_machine: int = Field(
        default=1, ge=1, description="The most engines of one machine; each plans for its share of memory."
    )

    def load(self) -> Settings:
        """The settings as they are where this is called: each machine reads its own file and environment.

        Raises:
            StartError: one is unknown or wrong, or asks for what engines elsewhere cannot do.
        """
        settings = load_settings(self.config, self.settings)
        if not settings.replicas:
            raise StartError("set replicas to the number of engines that Ray is to start")
        if settings.backend.urls:
            raise StartError("engines of Ray generate: leave backend.urls out")
        return settings

    @property
    def devices(self) -> int | None:
        """GPUs that the engines of a machine share; None where Ray gives them none."""
        return max(1, round(self.per_machine * self.gpus)) if self.gpus else None
