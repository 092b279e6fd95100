"""uvicorn's HTTP/1.1 with what it lacks: bounds on how long a request's head takes and on its size, and on how long a
client leaves an answer unread."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_SECONDS = 20.0
HEAD_BYTES = 1 << 16
STALL_SECONDS = 60.0
STALL_BYTES = 1 << 14


class BoundedProtocol(HttpToolsProtocol):
    """For ``uvicorn.Config(http=...)``. A connection is closed whose first bytes, or the rest of a head that has begun,
    do not come within HEAD_SECONDS, or whose head has more than HEAD_BYTES; and one whose client, while
    what is to be sent waits for it, reads less than STALL_BYTES in ``stall`` seconds."""

    _late: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None
    _head = 0  # bytes of the head that has begun
    _in_head = True
    _last = b""  # of what has come of it: its end may come in two parts

    def __init__(self, *args: Any, stall: float = STALL_SECONDS, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._stall = stall

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._stop_stalling()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait_for_reading()

    def resume_writing(self) -> None:
        self._stop_stalling()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            joined = self._last + data
            end = joined.find(b"\r\n\r\n")
            self._head += len(data) if end < 0 else max(end - len(self._last), 0)
            self._last = joined[-3:]
            if self._head > HEAD_BYTES:
                self.send_400_response(f"The head has more than {HEAD_BYTES} bytes.")
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._wait()

    def on_headers_complete(self) -> None:
        self._stop_waiting()
        self._in_head, self._head = False, 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head, self._head, self._last = True, 0, b""

    def _wait(self) -> None:
        self._stop_waiting()
        self._late = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _wait_for_reading(self) -> None:
        unread = self.transport.get_write_buffer_size()
        self._stalled = self.loop.call_later(self._stall, self._cut_off, unread)

    def _cut_off(self, unread: int) -> None:
        """Unless some of what was unread has been read: an answer that is one message may take longer."""
        if unread - self.transport.get_write_buffer_size() < STALL_BYTES:
            self.transport.abort()
        else:
            self._wait_for_reading()

    def _stop_stalling(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
