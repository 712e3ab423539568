"""Work that lasts only as long as the client listens."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

Result = TypeVar("Result")


class ClientGone(Exception):
    """The client left; there is nobody to tell."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Run `work`; when the client leaves, cancel it and wait for its cleanup.

    Call it after the request's body was read, so that the next message can only be the disconnect.

    Raises:
        ClientGone: the client left first.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        watcher.cancel()
        task.cancel()
        await asyncio.wait((task, watcher))
        if not task.cancelled():
            task.exception()  # marked as seen: what failed while nobody listened is nobody's error


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
