"""What the two processes tell each other: msgpack objects over a pair of sockets.

To the engine: ``{"op": "submit", "key", "ids", "sampling", "draw"}``, ``{"op": "cancel", "key"}``,
``{"op": "metrics"}``, and ``{"op": "ready"}`` once, when it has been told so. From it, in one frame a step:
``{"events": [[key, ids, logprobs, alternatives, finish_reason, cached, prompt], …]}``, ``{"refused": key, "message"}``,
``{"lost": key, "message"}``, ``{"metrics": {…}}``; ``{"start": {…}}`` and ``{"ready": {…}}`` once; and
``{"drain": true}``.
"""

import socket
from typing import Any

import msgpack

Frame = dict[str, Any]
MOST = 1 << 28  # bytes that are not yet whole frames
_AT_ONCE = 1 << 18


def pack(frame: Frame) -> bytes:
    packed = msgpack.packb(frame)
    assert packed is not None
    return packed


def unpacker() -> msgpack.Unpacker:
    """``feed`` it with bytes, and iterate over what is whole. Lists come as tuples: with a long prompt's alternatives
    come hundreds of thousands, and where they are lists the garbage collector goes through them again and again."""
    return msgpack.Unpacker(raw=False, use_list=False, max_buffer_size=MOST, strict_map_key=False)


class Closed(Exception):  # noqa: N818
    """The other process has ended."""


class Link:
    """One end of the pair, for who waits by a selector."""

    def __init__(self, end: socket.socket):
        self._end, self._unpacker = end, unpacker()
        end.setblocking(True)

    def close(self) -> None:
        self._end.close()

    def fileno(self) -> int:
        return self._end.fileno()

    def send(self, frame: Frame) -> None:
        """Waits while the other side is behind. Raises Closed."""
        try:
            self._end.sendall(pack(frame))
        except OSError as error:
            raise Closed from error

    def receive(self, *, wait: bool = False) -> list[Frame]:
        """What has come; with ``wait`` at least some bytes of it. Raises Closed."""
        flags = 0 if wait else socket.MSG_DONTWAIT
        while True:
            try:
                came = self._end.recv(_AT_ONCE, flags)
            except BlockingIOError:
                break
            except OSError as error:
                raise Closed from error
            if not came:
                raise Closed
            self._unpacker.feed(came)
            flags = socket.MSG_DONTWAIT
        return list(self._unpacker)
