"""The HTTP process: ``python -m deepseek_jax.serve.http_process LISTENING PAIR``, two sockets that it inherits. No jax.

What it is told by signals it ignores: the engine's process says when to end.
"""

import asyncio
import contextlib
import functools
import signal
import socket
import sys
import time
from collections.abc import Iterator

import uvicorn

from deepseek_jax.data.chat_templates import with_template
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.serve.app import make_app
from deepseek_jax.serve.config import ServeConfig
from deepseek_jax.serve.guard import guarded
from deepseek_jax.serve.link import Frame
from deepseek_jax.serve.protocol import BoundedProtocol
from deepseek_jax.serve.remote import RemoteAsker
from deepseek_jax.typed import from_dict

_LAST_SECONDS = 5  # that connections without an answer in them are given at the end
_KEPT_ALIVE = 65  # longer than load balancers keep idle connections, so that none is closed as it is used


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def main(arguments: list[str]) -> int:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    listening, pair = (socket.socket(fileno=int(argument)) for argument in arguments)
    return asyncio.run(_serve(listening, pair))


async def _serve(listening: socket.socket, pair: socket.socket) -> int:
    asker = RemoteAsker(*await asyncio.open_connection(sock=pair))
    engine = asyncio.create_task(asker.run())
    await asyncio.wait({engine, asker.started}, return_when=asyncio.FIRST_COMPLETED)
    if engine.done():
        return 1
    tokenizer, config = _told(asker.started.result())
    app = make_app(asker, tokenizer, config)
    server = _Server(
        uvicorn.Config(
            guarded(app, config),
            http=functools.partial(BoundedProtocol, stall=config.stall_seconds),  # pyright: ignore
            ws="none",
            lifespan="off",
            access_log=False,
            log_level="warning",
            server_header=False,
            limit_concurrency=config.connections,
            timeout_keep_alive=_KEPT_ALIVE,
            timeout_graceful_shutdown=_LAST_SECONDS,
        )
    )
    draining = asyncio.create_task(_drain(asker, app.state.desk, server, config.drain_seconds))
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    await asyncio.wait({engine, serving}, return_when=asyncio.FIRST_COMPLETED)
    server.should_exit = True
    await serving
    draining.cancel()
    return 0 if asker.state == "draining" else 1


async def _drain(asker: RemoteAsker, desk, server: uvicorn.Server, seconds: float) -> None:
    """Once told to, end when no answer is open."""
    await asker.drained.wait()
    last = time.monotonic() + seconds
    while desk.open and time.monotonic() < last:
        await asyncio.sleep(0.02)
    server.should_exit = True


def _told(start: Frame) -> tuple[Tokenizer, ServeConfig]:
    tokenizer = Tokenizer.from_folder(start["tokenizer"])
    tokenizer = with_template(tokenizer, start["chat_template"]).over(start["vocab_size"])
    return tokenizer, from_dict(ServeConfig, start["config"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
