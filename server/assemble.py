"""Which build a configuration asks for."""

from loramux.server.backend.front import build_front
from loramux.server.build import build
from loramux.server.errors import StartError
from loramux.server.parts import Parts
from loramux.server.replicas.build import build_edge
from loramux.server.settings import Settings


def assemble(settings: Settings) -> Parts:
    """The parts of the server that the settings describe: with an engine of its own, with replicas that have
    one each, or in front of backends.

    Raises:
        StartError, AdapterError, RouterError: one line that names the file or setting at fault.
    """
    refuse_both(settings)
    if settings.backend.urls:
        return build_front(settings)
    return build_edge(settings) if settings.replicas else build(settings)


def refuse_both(settings: Settings) -> None:
    """Raises `StartError` where both replicas and backends are to generate."""
    if settings.backend.urls and settings.replicas:
        raise StartError(
            "replicas are processes of this server and generate: set either replicas or backend.urls"
        )
