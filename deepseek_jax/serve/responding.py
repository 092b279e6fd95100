"""From pieces to an HTTP response: JSON, or server-sent events while they come."""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from typing import Any, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.serve.answering import Asked, Piece, answers
from deepseek_jax.serve.asking import Asker, LostError, RefusedError
from deepseek_jax.serve.config import ServeConfig
from deepseek_jax.serve.errors import ApiError, field_of, whole
from deepseek_jax.serve.meters import Meters

T = TypeVar("T")


class Form(Protocol):
    """What a request's answers are written in: each piece is ``add``ed, and all of them are one object, ``whole``; or
    it is ``told`` in a stream, which ``begin``s and ``end``s, or has ``failed``."""

    def add(self, piece: Piece) -> object: ...

    def whole(self) -> dict[str, Any]: ...

    def begin(self) -> bytes: ...

    def told(self, piece: Piece) -> bytes:
        """b"" where there is nothing to tell."""
        ...

    def end(self) -> bytes: ...

    def failed(self, error: ApiError) -> bytes: ...


class Desk:
    """Takes requests on while there is room."""

    def __init__(self, asker: Asker, tokenizer: Tokenizer, config: ServeConfig, meters: Meters):
        self.asker, self.tokenizer, self.config, self.meters = asker, tokenizer, config, meters
        self.open = 0  # answers
        self._seconds = 1.0  # that a request took of late

    def check(self) -> None:
        """ApiError while it is loading or ending."""
        if self.asker.state != "ready":
            raise ApiError(503, f"the server is {self.asker.state}", wait=5)

    async def answers(self, asked: Asked) -> AsyncGenerator[Piece]:
        """``answering.answers``, counted and watched. ApiError in the place of the first: refused, or too many wait."""
        self.check()
        room = self.asker.served.slots + self.config.queue
        if asked.count > room:  # whenever it came
            raise ApiError(400, f"{asked.count} answers: this server has room for {room} at a time", param="n")
        if self.open + asked.count > room:
            wait = math.ceil(min(max(self._seconds, 1.0), 60.0))
            raise ApiError(429, f"{self.open} answers are open: come again", code="queue_full", wait=wait)
        self.open += asked.count
        began, watch, ended = time.perf_counter(), self.meters.watch(asked.count), "cancelled"
        try:
            async with aclosing(answers(self.asker, self.tokenizer, asked)) as pieces:
                async for piece in pieces:
                    watch.piece(piece)
                    yield piece
            self._seconds += 0.1 * (time.perf_counter() - began - self._seconds)
        except RefusedError as error:
            ended = "refused"
            raise ApiError(400, whole(str(error)), param=field_of(str(error), asked.grammar)) from error
        except LostError as error:
            ended = "error"
            raise ApiError(503, str(error)) from error
        finally:
            self.open -= asked.count
            watch.end(ended)

    async def respond(self, request: Request, asked: Asked, form: Form, *, stream: bool) -> Response:
        """All of it as one object, or a stream of events. What is refused is so before a stream begins; who goes is
        given up."""
        pieces = self.answers(asked)
        first = await unless_gone(request.receive, anext(pieces))
        if stream:
            return EventStream(form, first, pieces, asked.count)
        return await unless_gone(request.receive, _all(form, first, pieces))


async def _all(form: Form, first: Piece, pieces: AsyncGenerator[Piece]) -> Response:
    form.add(first)
    async with aclosing(pieces):
        async for piece in pieces:
            form.add(piece)
    return JSONResponse(form.whole())


class EventStream(Response):
    """Server-sent events of ``count`` answers, whose source is closed when the client goes, too."""

    def __init__(self, form: Form, first: Piece, pieces: AsyncGenerator[Piece], count: int):
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        del self.headers["Content-Length"]
        self._form, self._first, self._pieces, self._left = form, first, pieces, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._pieces):
            with suppress(ApiError):  # it has gone
                await unless_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        """The end of the stream goes with the end of the last answer: each message is a write to the socket."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        form, piece, told = self._form, self._first, self._form.begin()
        try:
            while piece:
                told += form.told(piece)
                self._left -= bool(piece.finish_reason)
                if told and self._left:
                    await send({"type": "http.response.body", "body": told, "more_body": True})
                    told = b""
                piece = await anext(self._pieces, None)
            told += form.end()
        except ApiError as error:
            told += form.failed(error)
        await send({"type": "http.response.body", "body": told})


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What it comes to; cancelled where the client goes first, and ApiError, which nobody reads."""
    task, gone = asyncio.current_task(), False
    assert task is not None

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watching = asyncio.create_task(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if gone and not task.uncancel():  # else somebody has cancelled it
            raise ApiError(499, "the client has gone") from None
        raise
    finally:
        watching.cancel()
