"""Who may call what: API keys for everything but the probes, the admin key for adapter administration."""

import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from loramux.server.edge.failures import describe, send_error
from loramux.server.errors import Forbidden, RequestError, Unauthorized

# Pages and document are the same for everyone; the first page asks for the key itself.
OPEN_PATHS = frozenset({"/", "/docs", "/health", "/openapi.json", "/ready"})
ADMIN_PATHS = frozenset(
    {
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/v1/lora_adapters",
        "/v1/replicas",
        "/v1/drain_replica",
    }
)


class Keys:
    """ASGI middleware. It looks at the path that the router will see, never at Host or forwarded headers."""

    def __init__(
        self, app: ASGIApp, keys: Sequence[str], admin_key: str | None, metrics_need_key: bool
    ) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._admin_key = None if admin_key is None else admin_key.encode()
        self._open = OPEN_PATHS if metrics_need_key else OPEN_PATHS | {"/metrics"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope)
            except RequestError as error:
                await send_error(describe(error), scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        path = scope["path"]
        if path in ADMIN_PATHS:
            if self._admin_key is None:
                raise Forbidden(
                    "adapter administration is off; set admin_key to turn it on", code="admin_off"
                )
            if not _matches(_bearer(scope), [self._admin_key]):
                raise Unauthorized(
                    "this route needs the admin key as a bearer token", code="invalid_admin_key"
                )
        elif self._keys and path not in self._open and not _matches(_bearer(scope), self._keys):
            raise Unauthorized(_key_problem(scope), code="invalid_api_key")


def _key_problem(scope: Scope) -> str:
    return "the API key is not valid" if _bearer(scope) else "an API key is needed as a bearer token"


def _bearer(scope: Scope) -> bytes:
    given = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(given) != 1:
        return b""
    kind, _, token = given[0].partition(b" ")
    return token.strip() if kind.lower() == b"bearer" else b""


def _matches(token: bytes, keys: Sequence[bytes]) -> bool:
    # Every key is compared, so that the time says nothing about which was close.
    return sum([hmac.compare_digest(token, key) for key in keys]) > 0 and bool(token)
