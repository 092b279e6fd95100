"""What stands around all routes: requests are counted, and who does not read is cut off."""

import asyncio
from typing import Any

from deepseek_jax.serve.meters import Meters


class Sending:
    """ASGI middleware. stall: seconds that the client may leave what is sent unread."""

    def __init__(self, app: Any, meters: Meters, stall: float):
        self._app, self._meters, self._stall = app, meters, stall

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 499  # nothing was answered: the client has gone

        async def sent(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            try:
                await asyncio.wait_for(send(message), self._stall)
            except TimeoutError as error:
                raise OSError("the client reads nothing") from error

        try:
            await self._app(scope, receive, sent)
        finally:
            self._meters.request(getattr(scope.get("route"), "path", "other"), status)
