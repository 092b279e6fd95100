"""What a command is to its shell: streams that never decide its status, Ctrl-C in one line."""

import contextlib
import errno
import io
import multiprocessing
import os
import signal
import sys
from typing import Any, NoReturn

INTERRUPTED = 130  # as shells have it


def begin() -> None:
    """Prepare the process for a command. Until ``interruptible``, Ctrl-C ends it on the spot: nothing is lost while
    modules are imported, and an exception out of their midst would be a page of traceback."""
    sys.stdout, sys.stderr = _steady(sys.stdout), _steady(sys.stderr)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as behind nohup
        signal.signal(signal.SIGINT, _leave)


def interruptible() -> None:
    """From here on Ctrl-C unwinds the command; a second one does not wait for that."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, _interrupt)


def leave() -> NoReturn:
    """End an interrupted process without tidying up: XLA's threads may be computing still, and the interpreter's end
    would pull from under them what they read."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for child in multiprocessing.active_children():
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(INTERRUPTED)


def _interrupt(number: int, frame: Any) -> NoReturn:
    signal.signal(signal.SIGINT, _leave)
    raise KeyboardInterrupt


def _leave(number: int, frame: Any) -> NoReturn:
    os.write(2, b"\ninterrupted\n")  # print is not safe within a signal handler
    os._exit(INTERRUPTED)


class _Steady(io.FileIO):
    """A file that takes what nobody reads any more. What cannot be written, for want of room say, is an error once."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)  # where the rest goes
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if error.errno in (errno.EPIPE, errno.EIO):  # a pipe without a reader, a terminal that was closed
                return memoryview(data).nbytes
            raise


def _steady(stream: Any) -> Any:
    """The same stream, but that what its encoding cannot show is replaced, and what nobody reads is dropped."""
    if stream is None:  # closed by the shell
        return open(os.devnull, "w", encoding="utf-8")
    return io.TextIOWrapper(
        io.BufferedWriter(_Steady(stream.fileno(), "wb", closefd=False)),
        encoding=stream.encoding,
        errors="replace",
        line_buffering=stream.line_buffering or stream.write_through,
    )
