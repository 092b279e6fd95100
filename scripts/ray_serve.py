"""Replicas of ``deepseek-jax serve`` behind Ray Serve, which starts them, shares out requests and replaces what dies.

    pip install 'deepseek-jax[serve]' 'ray[serve]'
    serve run scripts.ray_serve:replicas replicas=2 gpus=1 command='PATH --serving.slots 64'

``command`` is what would stand behind ``deepseek-jax serve``. A replica is a server of its own on a free port of
127.0.0.1; bodies, keys and the Host header pass through, so its limits and refusals hold, and streams stay streams.
"""

import asyncio
import re
import shlex
import sys

import aiohttp  # pyright: ignore[reportMissingImports]
from ray import serve  # pyright: ignore[reportMissingImports]
from starlette.requests import Request
from starlette.responses import StreamingResponse

BETWEEN_TWO = {"connection", "keep-alive", "transfer-encoding", "content-length", "upgrade"}  # of one connection alone


class Replica:
    async def __init__(self, command: str):
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "deepseek_jax.cli.main", "serve", *shlex.split(command), "--port", "0"),
            stderr=asyncio.subprocess.PIPE,
        )
        self.url = None
        async for line in self._lines():
            if found := re.search(rb"ready: (http://\S+)/v1 ", line):
                self.url = found[1].decode()
                break
        if self.url is None:
            raise RuntimeError(f"deepseek-jax serve {command} ended with status {await self.process.wait()}")
        self.telling = asyncio.create_task(self._tell())
        self.client = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None), auto_decompress=False)

    async def _lines(self):
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            print(line.decode(), end="", file=sys.stderr)
            yield line

    async def _tell(self) -> None:
        async for _ in self._lines():
            pass

    async def __call__(self, request: Request) -> StreamingResponse:
        url = f"{self.url}{request.url.path}?{request.url.query}"
        headers = [(name, value) for name, value in request.headers.items() if name not in BETWEEN_TWO]
        answer = await self.client.request(request.method, url, headers=headers, data=await request.body())
        kept = {name: value for name, value in answer.headers.items() if name.lower() not in BETWEEN_TWO}
        return StreamingResponse(self._body(answer), answer.status, kept)

    async def _body(self, answer: aiohttp.ClientResponse):
        """What comes, as it comes. Who goes closes this, and so the server's connection: it gives up the answer."""
        async with answer:
            async for part in answer.content.iter_any():
                yield part

    async def check_health(self) -> None:
        if self.process.returncode is not None:
            raise RuntimeError(f"deepseek-jax serve ended with status {self.process.returncode}")

    async def __del__(self) -> None:
        if self.process.returncode is None:
            self.process.terminate()  # running answers are finished
            await self.process.wait()


def replicas(options: dict[str, str]) -> serve.Application:
    """The application of ``serve run``: ``command``, ``replicas`` (1) and ``gpus`` of each (0)."""
    if options.keys() - {"command", "replicas", "gpus"} or "command" not in options:
        raise ValueError(f"ray_serve takes command=, replicas= and gpus=, command at least; it got {sorted(options)}")
    deployed = serve.deployment(
        num_replicas=int(options.get("replicas", 1)),
        ray_actor_options={"num_gpus": float(options.get("gpus", 0))},
        max_ongoing_requests=1024,
        graceful_shutdown_timeout_s=660,
    )
    return deployed(Replica).bind(options["command"])
