"""The engine's process, as an ``Asker`` of the HTTP process."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator
from typing import Any

from deepseek_jax.serve.asking import Event, LostError, RefusedError, Served, State
from deepseek_jax.serve.link import Frame, pack, unpacker

_AT_ONCE = 1 << 18


class RemoteAsker:
    """``run`` it beside the server; it returns when the other process has ended.

    started: what this process is told first. drained: the other one has been told to end.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._reader, self._writer = reader, writer
        self._answers: dict[int, asyncio.Queue[Event | Exception]] = {}
        self._told: list[asyncio.Future[dict[str, float]]] = []
        self._keys = itertools.count()
        self._served: Served | None = None
        self.state: State = "loading"
        self.started: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()
        self.drained = asyncio.Event()

    @property
    def served(self) -> Served:
        assert self._served is not None, "it is loading"
        return self._served

    async def submit(self, ids: list[int], sampling: dict[str, Any], draw: int) -> AsyncGenerator[Event]:
        key, ended = next(self._keys), False
        self._send({"op": "submit", "key": key, "ids": ids, "sampling": sampling, "draw": draw})
        came = self._answers[key] = asyncio.Queue()
        try:
            while not ended:
                event = await came.get()
                ended = isinstance(event, Exception) or bool(event.finish_reason)
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            del self._answers[key]
            if not ended:
                with contextlib.suppress(LostError):
                    self._send({"op": "cancel", "key": key})

    async def metrics(self) -> dict[str, float]:
        told = asyncio.get_running_loop().create_future()
        self._send({"op": "metrics"})
        self._told.append(told)
        return await told

    async def run(self) -> None:
        frames = unpacker()
        with contextlib.suppress(ConnectionError):  # as where it is killed with something of ours unread
            while came := await self._reader.read(_AT_ONCE):
                frames.feed(came)
                for frame in frames:
                    self._take(frame)
        self._writer.close()
        lost = LostError("the engine has ended")
        for answer in self._answers.values():
            answer.put_nowait(lost)
        for told in self._told:
            if not told.done():
                told.set_exception(lost)

    def _take(self, frame: Frame) -> None:
        for key, *event in frame.get("events", ()):
            if (answer := self._answers.get(key)) is not None:  # else nobody waits for it any more
                answer.put_nowait(Event(*event))
        if "refused" in frame and (answer := self._answers.get(frame["refused"])) is not None:
            answer.put_nowait(RefusedError(frame["message"]))
        if "lost" in frame and (answer := self._answers.get(frame["lost"])) is not None:
            answer.put_nowait(LostError(frame["message"]))
        if "metrics" in frame:
            told = self._told.pop(0)
            if not told.done():
                told.set_result(frame["metrics"])
        if "start" in frame:
            self.started.set_result(frame["start"])
        if "ready" in frame:
            self._served = Served(**frame["ready"])
            self.state = "ready" if self.state == "loading" else self.state
            with contextlib.suppress(LostError):
                self._send({"op": "ready"})
        if "drain" in frame:
            self.state = "draining"
            self.drained.set()

    def _send(self, frame: Frame) -> None:
        if self._writer.is_closing():
            raise LostError("the engine has ended")
        self._writer.write(pack(frame))
