"""Which build a configuration asks for."""

from loramux.server.backend.front import build_front
from loramux.server.build import build
from loramux.server.parts import Parts
from loramux.server.settings import Settings


def assemble(settings: Settings) -> Parts:
    """The parts of the server that the settings describe: with an engine of its own, or in front of backends.

    Raises:
        StartError, AdapterError, RouterError: one line that names the file or setting at fault.
    """
    return build_front(settings) if settings.backend.urls else build(settings)
