"""Requests to any server of OpenAI's kind, streamed, and when each part of their answers came. No jax: a process of
``bench serve`` is this module alone, ``python -m deepseek_jax.cli.bench_client``, told its part and asked its findings
as JSON.

HTTP is read by hand: a client library takes as long for an event as a good server does, and would be what is measured.
"""

import asyncio
import dataclasses
import json
import random
import ssl
import sys
import time
from typing import Any
from urllib.parse import urlsplit


@dataclasses.dataclass(frozen=True)
class Load:
    """What one process sends: ``bodies``, as a closed loop of ``concurrency``, or at ``rate`` a second with gaps of a
    Poisson process, as many at once as come."""

    url: str
    bodies: list[str]
    headers: dict[str, str]
    concurrency: int
    rate: float
    timeout: float
    seed: int


@dataclasses.dataclass
class Answer:
    """What became of a request, times in seconds by the clock of this machine. came: when each event with any of the
    answer in it did. failure: "" where all is well. prompt, tokens: as the server counts them, else 0 and events.
    found: of the prompt, in its cache."""

    sent: float
    came: list[float] = dataclasses.field(default_factory=list)
    prompt: int = 0
    found: int = 0
    tokens: int = 0
    failure: str = ""


class _Stream(asyncio.Protocol):
    """One request on a connection of its own."""

    def __init__(self, request: bytes, answer: Answer, done: asyncio.Future[None]):
        self._request, self._answer, self._done = request, answer, done
        self._rest, self._head, self._chunked, self._events = b"", True, False, b""
        self._status, self._ended, self._finished = 0, False, False

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._rest += data
        if self._head:
            head, found, rest = self._rest.partition(b"\r\n\r\n")
            if not found:
                return
            first, *fields = head.lower().split(b"\r\n")
            self._status, self._chunked = int(first.split()[1]), b"transfer-encoding: chunked" in fields
            self._head, self._rest = False, rest
        self._events += self._body()
        *lines, self._events = self._events.split(b"\n")
        if self._status != 200:
            return  # its body is short: the whole of it is looked at when the connection ends
        now = time.monotonic()
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now)
        if self._ended:
            self._transport.close()

    def _body(self) -> bytes:
        """What has come of it."""
        if not self._chunked:
            body, self._rest = self._rest, b""
            return body
        parts = []
        while True:
            size, found, rest = self._rest.partition(b"\r\n")
            if not found:
                break
            length = int(size.split(b";")[0], 16)
            if len(rest) < length + 2:
                break
            parts.append(rest[:length])
            self._rest = rest[length + 2 :]
            if not length:
                break
        return b"".join(parts)

    def _event(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self._ended = True
            return
        told = json.loads(data)
        if "error" in told:
            self._answer.failure = str(told["error"])[:200]
        if usage := told.get("usage"):
            self._answer.prompt, self._answer.tokens = usage.get("prompt_tokens", 0), usage["completion_tokens"]
            self._answer.found = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        for choice in told.get("choices", ()):
            self._finished |= bool(choice.get("finish_reason"))
            said = choice.get("delta") or {"content": choice.get("text")}
            if said.get("content") or said.get("reasoning_content") or said.get("reasoning") or said.get("tool_calls"):
                self._answer.came.append(now)
                break

    def connection_lost(self, error: Exception | None) -> None:
        answer = self._answer
        if self._status != 200:
            said = (self._events + self._rest).decode(errors="replace")
            answer.failure = f"status {self._status}: {said[:200]}" if self._status else f"no answer: {error}"
        elif not (answer.failure or self._ended or self._finished):
            answer.failure = f"cut off: {error}" if error else "cut off"
        answer.tokens = answer.tokens or len(answer.came)
        if not self._done.done():
            self._done.set_result(None)

    def cut(self) -> None:
        self._transport.abort()


async def _ask(load: Load, body: str, answers: list[Answer]) -> None:
    where = urlsplit(load.url)
    secure = ssl.create_default_context() if where.scheme == "https" else None
    port = where.port or (443 if secure else 80)
    content = body.encode()
    fields = {"Host": where.netloc, "Content-Type": "application/json", "Accept": "text/event-stream"}
    fields |= {"Content-Length": str(len(content)), "Connection": "close", **load.headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    request = f"POST {where.path} HTTP/1.1\r\n{head}\r\n".encode() + content
    answer = Answer(time.monotonic())
    answers.append(answer)
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    stream = _Stream(request, answer, done)
    try:
        await loop.create_connection(lambda: stream, where.hostname or "", port, ssl=secure)
    except OSError as error:
        answer.failure = f"no connection: {error}"
        return
    try:
        await asyncio.wait_for(done, load.timeout)
    except TimeoutError:
        answer.failure = f"not ended within {load.timeout:g} s"
        stream.cut()


async def send(load: Load) -> list[Answer]:
    """Send it all -> what became of each request, in the order in which they were sent."""
    answers: list[Answer] = []
    left = iter(load.bodies)
    if load.rate:
        rng, tasks, at = random.Random(load.seed), [], time.monotonic()
        for body in left:
            await asyncio.sleep(max(at - time.monotonic(), 0))
            tasks.append(asyncio.create_task(_ask(load, body, answers)))
            at += rng.expovariate(load.rate)
        await asyncio.gather(*tasks)
        return answers

    async def one_after_another() -> None:
        for body in left:
            await _ask(load, body, answers)

    await asyncio.gather(*(one_after_another() for _ in range(load.concurrency)))
    return answers


async def send_by_processes(loads: list[Load]) -> list[Answer]:
    """Each by a process of its own, for more events a second than one can read."""
    if len(loads) == 1:
        return await send(loads[0])

    async def one(load: Load) -> list[Answer]:
        command = [sys.executable, "-m", "deepseek_jax.cli.bench_client"]
        pipes: dict[str, Any] = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE}
        child = await asyncio.create_subprocess_exec(*command, **pipes)
        said, _ = await child.communicate(json.dumps(dataclasses.asdict(load)).encode())
        if child.returncode:
            raise RuntimeError(f"a client process has ended with status {child.returncode}")
        return [Answer(**each) for each in json.loads(said)]

    return [answer for some in await asyncio.gather(*map(one, loads)) for answer in some]


def split(load: Load, processes: int) -> list[Load]:
    """Parts of it for so many processes, as even as can be: each has requests, and a rate, by its share of how many
    are under way at once, so that no part goes on alone when the others have ended."""
    whole = min(load.concurrency, len(load.bodies))
    count = min(processes, whole)

    def part(i: int) -> Load:
        first, last = whole * i // count, whole * (i + 1) // count
        bodies = load.bodies[len(load.bodies) * first // whole : len(load.bodies) * last // whole]
        own = {"concurrency": last - first, "rate": load.rate * (last - first) / whole, "seed": load.seed + i}
        return dataclasses.replace(load, bodies=bodies, **own)

    return [part(i) for i in range(count)]


if __name__ == "__main__":
    found = asyncio.run(send(Load(**json.load(sys.stdin))))
    json.dump([dataclasses.asdict(answer) for answer in found], sys.stdout)
