"""What goes wrong, and what the client is told.

    ServerError
    ├── RequestError            400  the request cannot be understood or served as it stands
    │   ├── UnknownModel        404
    │   ├── Unauthorized        401
    │   ├── Forbidden           403
    │   ├── Conflict            409
    │   ├── TooLarge            413
    │   ├── UnsupportedMedia    415
    │   └── RequestTimeout      408
    ├── NotReady                503  loading, or draining before an exit
    └── StartError                   the server cannot start; one line, for the operator's terminal
        └── UsageError               a command was called in a way that it does not know

`edge/failures.py` turns these, and the errors of the other folders, into OpenAI error bodies.
"""

INVALID = "invalid_request_error"
SERVER = "server_error"


class ServerError(Exception):
    """Anything the server itself reports."""


class RequestError(ServerError):
    """The request is at fault; `param` is the path of the field, `code` a stable word for programs."""

    status = 400
    kind = INVALID

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class UnknownModel(RequestError):
    """`model`, or an id in `lora`, names nothing that is served."""

    status = 404

    def __init__(self, name: str, *, param: str = "model", known: tuple[str, ...] = ()) -> None:
        shown = ", ".join(known[:8]) + (", …" if len(known) > 8 else "")
        hint = f"; served: {shown}" if shown else ""
        super().__init__(f"{name[:200]!r} is not served here{hint}", param=param, code="model_not_found")


class Unauthorized(RequestError):
    """No key, or a wrong one."""

    status = 401
    kind = "authentication_error"


class Forbidden(RequestError):
    """The route exists but is turned off."""

    status = 403
    kind = "permission_error"


class Conflict(RequestError):
    """The named thing exists already, or is in use."""

    status = 409


class TooLarge(RequestError):
    """The body is over the configured number of bytes."""

    status = 413


class UnsupportedMedia(RequestError):
    """A body in a form that is not read."""

    status = 415


class RequestTimeout(RequestError):
    """The client took too long to send its request."""

    status = 408


class NotReady(ServerError):
    """The server is loading or draining; another replica, or a later try, will do."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class StartError(ServerError):
    """The server cannot start. The message is one line that names the file or setting and the way out."""


class UsageError(StartError):
    """A command was called in a way that it does not know; the message names the option."""
