"""Calls of a user's functions in processes that are killed when they hang."""

import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

# A program of its own and no module: the package's own imports bring jax.
_PROGRAM = Path(__file__).with_name("user_worker.py")
_START_LIMIT = 120.0  # for the imports of the user's file


class Outcome(NamedTuple):
    """What became of a call: the value it returned, or why there is none (`text` is the error's)."""

    value: Any
    failure: Literal["", "timeout", "crash", "error", "unjudged"] = ""
    text: str = ""


class WorkerPool:
    """`count` processes that have loaded `functions` (file, name, number of arguments), each with one call at a time.

    A process that has not answered within `time_limit` seconds is killed with its children, and so is one that
    breaks; the next call starts another. ValueError, at once, where a file cannot be loaded.
    """

    def __init__(self, functions: Sequence[tuple[str, str, int]], *, count: int, time_limit: float):
        self._time_limit = time_limit
        self._workers = [_Worker(functions) for _ in range(count)]
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        self._workers[0].start()
        for worker in reversed(self._workers):  # the one that has started is taken first
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="user")

    def call(self, requests: Sequence[tuple[Any, ...]]) -> list[Outcome]:
        """The outcomes of (function's index, *arguments), in their order."""
        # What JSON has no form for (a date, bytes) is sent as text.
        lines = [json.dumps(request, default=str).encode() + b"\n" for request in requests]
        return list(self._threads.map(self._call, lines))

    def _call(self, line: bytes) -> Outcome:
        worker = self._idle.get()
        try:
            return worker.call(line, self._time_limit)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.stop()
        self._threads.shutdown()  # a call that was waiting has seen its pipe's end
        for worker in self._workers:
            worker.close()


class _Worker:
    def __init__(self, functions: Sequence[tuple[str, str, int]]):
        self._functions = functions
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if self._process is not None:
            return
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM), json.dumps(self._functions)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # a group of its own, killed as one; and Ctrl-C is the parent's business
            env=os.environ | {"JAX_PLATFORMS": "cpu"},  # the accelerator is the parent's
        )
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
        files = ", ".join(dict.fromkeys(file for file, *_ in self._functions))
        first: dict[str, Any] = {}
        try:
            first = self._exchange(b"", _START_LIMIT)
            if "error" in first:
                raise ValueError(first["error"])
        except TimeoutError as error:
            raise ValueError(f"{files}: not loaded after {_START_LIMIT:.0f} s") from error
        except OSError as error:
            raise ValueError(f"{files}: the process that loads it has ended") from error
        finally:
            if "ready" not in first:
                self.close()

    def call(self, line: bytes, limit: float) -> Outcome:
        self.start()
        try:
            reply = self._exchange(line, limit)
        except TimeoutError:
            self.close()
            return Outcome(None, "timeout", f"no answer within {limit:g} s")
        except (OSError, ValueError):  # the pipe is closed, or says what is no reply
            assert self._process is not None
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1)  # for its own exit code
            return Outcome(None, "crash", f"its process ended with code {self.close()}")
        return Outcome(None, "error", reply["error"]) if "error" in reply else Outcome(reply["value"])

    def _exchange(self, message: bytes, limit: float) -> dict[str, Any]:
        """Sends the message and reads a line. TimeoutError after `limit` seconds, whichever of the two it was."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        to_worker, from_worker = process.stdin.fileno(), process.stdout.fileno()
        poll, end = select.poll(), time.monotonic() + limit
        poll.register(from_worker, select.POLLIN)
        if message:
            poll.register(to_worker, select.POLLOUT)
        left, reply = memoryview(message), b""
        while not reply.endswith(b"\n"):
            if (wait := end - time.monotonic()) <= 0:
                raise TimeoutError
            ready = dict(poll.poll(wait * 1000))
            if to_worker in ready:
                left = left[os.write(to_worker, left) :]
                if not left:
                    poll.unregister(to_worker)
            if from_worker in ready:
                part = os.read(from_worker, 1 << 16)
                if not part:
                    raise BrokenPipeError
                reply += part
        return json.loads(reply)

    def stop(self) -> None:
        """Kills the process and its children; its pipes stay, since a call may be waiting for one."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> int | None:
        """Kills the process, if there is one, and gives its exit code (a signal's is negative)."""
        self.stop()
        process, self._process = self._process, None
        if process is None:
            return None
        code = process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()
        return code
