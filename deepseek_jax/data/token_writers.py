"""The processes that make tokens beside a run, as seen from it."""

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import tokenizers

from deepseek_jax.data import token_worker
from deepseek_jax.data.tokenizer import Tokenizer


class TokenWriters:
    """`count` processes that write shards, or none: then this process does.

    typecode: of the ids, see `token_worker.write_shard`.
    """

    def __init__(self, tokenizer: Tokenizer, typecode: str, count: int):
        self._typecode = typecode
        self._backend = None if count else tokenizers.Tokenizer.from_str(tokenizer.plain_json)
        self._idle: queue.Queue[socket.socket] = queue.Queue()
        self._at_work: list[Future[None]] = []
        self._links: list[socket.socket] = []
        if count:
            self._threads = ThreadPoolExecutor(count)  # each waits for a process
            self._start(tokenizer.plain_json.encode("utf-8"), count)

    def _start(self, tokenizer: bytes, count: int) -> None:
        pairs = [socket.socketpair() for _ in range(count)]
        self._links = [ours for ours, _ in pairs]
        numbers = [theirs.fileno() for _, theirs in pairs]
        self._program = subprocess.Popen(
            [sys.executable, "-P", token_worker.__file__, *map(str, numbers)],
            stdin=subprocess.PIPE,
            pass_fds=numbers,
            start_new_session=True,  # Ctrl-C is this process' business, and all of its processes end as one
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},  # which it could not use after a fork
        )
        for ours, theirs in pairs:
            theirs.close()
            self._idle.put(ours)
        settings = json.dumps({"tokenizer": len(tokenizer), "type": self._typecode}).encode() + b"\n"
        assert self._program.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._program.stdin as pipe:  # told where an answer is missing
            pipe.write(settings + tokenizer)

    def write(self, group: list[bytes], path: Path) -> None:
        """Hands a shard to a process; waits while all of them are busy. Raises what an earlier one has met."""
        if self._backend is not None:
            return token_worker.write_shard(self._backend, group, path, self._typecode)
        link = self._idle.get()
        self._finished(wait=False)
        self._at_work.append(self._threads.submit(self._send, link, group, path))

    def _send(self, link: socket.socket, group: list[bytes], path: Path) -> None:
        reply = b""
        try:
            with link.makefile("rwb") as stream:
                stream.write(json.dumps({"path": str(path), "lengths": [len(d) for d in group]}).encode() + b"\n")
                stream.writelines(group)
                stream.flush()
                reply = stream.readline()
        except (BrokenPipeError, ConnectionResetError):
            pass  # told below
        finally:
            self._idle.put(link)
        if not reply:
            raise OSError(f"{path}: the process that makes these tokens has ended")
        if (error := json.loads(reply)) is not None:
            raise OSError(*error)

    def _finished(self, *, wait: bool) -> None:
        for future in [future for future in self._at_work if wait or future.done()]:
            future.result()
            self._at_work.remove(future)

    def __enter__(self) -> "TokenWriters":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._backend is not None:
            return
        try:
            if kind is None:
                self._finished(wait=True)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._program.pid, signal.SIGKILL)
            self._program.wait()
            self._threads.shutdown(cancel_futures=True)  # who was waiting for an answer has seen that none comes
            for link in self._links:
                link.close()
