"""Which build a configuration asks for."""

from loramux.server.errors import StartError
from loramux.server.parts import Parts
from loramux.server.settings import Settings


def assemble(settings: Settings) -> Parts:
    """The parts of the server that the settings describe: with an engine of its own, with replicas that have
    one each, or in front of backends.

    Raises:
        StartError, AdapterError, RouterError: one line that names the file or setting at fault.
    """
    refuse_both(settings)
    # Only that one of the three is imported which is wanted.
    if settings.backend.urls:
        from loramux.server.backend.front import build_front

        return build_front(settings)
    if settings.replicas:
        from loramux.server.replicas.build import build_edge

        return build_edge(settings)
    from loramux.server.build import build

    return build(settings)


def refuse_both(settings: Settings) -> None:
    """Raises `StartError` where both replicas and backends are to generate."""
    if settings.backend.urls and settings.replicas:
        raise StartError(
            "replicas are processes of this server and generate: set either replicas or backend.urls"
        )
