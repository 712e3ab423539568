"""What can be wrong with a backend; the message begins with its address.

EngineError
└── BackendError            502  it refused or failed a sequence, or is not what it has to be
    ├── BackendDown         503  it cannot be reached, or broke off
    └── BlendForgotten           it does not know a blend that was loaded: it was started anew
"""

from loramux.server.engine.protocol import EngineError


class BackendError(EngineError):
    """The backend refused or failed; `way` is what the operator can do, and part of the message."""

    def __init__(self, message: str, way: str = "") -> None:
        super().__init__(f"{message}; {way}" if way else message)
        self.what = message
        self.way = way


class BackendDown(BackendError):
    """No answer, or one that broke off; a later try may succeed."""

    retry_after = 2


class BlendForgotten(BackendError):
    """The backend does not know a blend by its name any more."""
