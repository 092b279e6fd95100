"""Overload for minutes: more clients than a server has room for, all kinds of answers, some of whom go in the middle.

    python scripts/soak_serve.py --seconds 600 --clients 48 [--model PATH|RECIPE --random] [-- more options of serve]

Starts ``deepseek-jax serve``; measures its capacity, what it answers to as many clients as it has slots in --measure
seconds, before and after overloading it. Where others work on the machine, and wall time says little, the share of
capacity is told by the engine's processor time too. Prints a line every ten seconds and at last that share, requests
that were accepted and not ended, pages held at the end, the memory of both processes. Exit status 1 where one falls
short.
"""

import argparse
import asyncio
import collections
import json
import os
import random
import re
import subprocess
import sys
import threading
import time

import openai

GROWTH = 1.15  # of memory, from a quarter of the time to its end


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo/pretrain")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--measure", type=float, default=60)
    parser.add_argument("--clients", type=int, default=48)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("more", nargs="*", default=["--random"])
    return parser.parse_args()


class Server:
    def __init__(self, asked: argparse.Namespace):
        command = [sys.executable, "-m", "deepseek_jax.cli.main", "serve", asked.model, *asked.more, "--port", "0"]
        command += ["--serving.slots", str(asked.slots), "--queue", str(asked.clients // 3)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        for line in self.process.stderr:
            print(line, end="", flush=True)
            if found := re.search(r"ready: (\S+)/v1 has (\S+),", line):
                self.url, self.name = found.groups()
                break
        else:
            sys.exit("it has not come up")
        threading.Thread(target=self._tell, daemon=True).start()

    def _tell(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            print(line, end="", flush=True)

    def cpu_seconds(self) -> float:
        """Of the engine's process."""
        with open(f"/proc/{self.process.pid}/stat") as file:
            user, system = file.read().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> dict[str, float]:
        """MiB of the engine's process and of the child."""
        with open(f"/proc/{self.process.pid}/task/{self.process.pid}/children") as file:
            child = file.read().split()[0]
        return {"engine": _resident(self.process.pid), "http": _resident(int(child))}


def _resident(pid: int) -> float:
    with open(f"/proc/{pid}/status") as file:
        return int(re.search(r"VmRSS:\s+(\d+)", file.read())[1]) / 1024  # pyright: ignore[reportOptionalSubscript]


class Load:
    """Clients that ask one thing after another; ``counts``: of how they ended."""

    def __init__(self, server: Server, seed: int, *, leave: float):
        self.client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0, timeout=600)
        self.model, self.leave, self.rng = server.name, leave, random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()
        self.tokens = 0

    async def run(self, clients: int, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        await asyncio.gather(*(self._client() for _ in range(clients)))

    async def _client(self) -> None:
        while time.monotonic() < self.end:
            try:
                await self._ask()
            except openai.RateLimitError as error:
                self.counts["429"] += 1
                await asyncio.sleep(min(float(error.response.headers.get("retry-after", 1)), 2) * self.rng.random())
            except openai.APIError as error:
                self.counts[f"lost: {type(error).__name__} {error}"[:100]] += 1
                await asyncio.sleep(0.5)

    async def _ask(self) -> None:
        rng, tokens, asked = self.rng, self.rng.choice((8, 32, 64)), self.rng.random()
        question = "".join(rng.choice("0123456789+-*= abc") for _ in range(rng.choice((5, 50, 120))))
        question = "A common beginning of some of them. " * (rng.random() < 0.5) + question
        given = {"model": self.model, "max_tokens": tokens, "temperature": rng.choice((0.0, 1.0))}
        if asked < 0.5:
            answer = await self.client.completions.create(prompt=question, **given)
            assert answer.usage is not None
            self._ended(answer.usage.completion_tokens)
            return
        messages = [{"role": "user", "content": question}]
        given |= {"messages": messages, "stream": True, "stream_options": {"include_usage": True}}
        stream = await self.client.chat.completions.create(**given)
        usage, leaves = None, rng.random() < self.leave
        async with stream:
            async for chunk in stream:
                usage = chunk.usage or usage
                if leaves:
                    self.counts["left"] += 1
                    return
        if usage is None:
            self.counts["lost: a stream without its end"] += 1
        else:
            self._ended(usage.completion_tokens)

    def _ended(self, tokens: int) -> None:
        self.counts["ended"] += 1
        self.tokens += tokens


async def engine(load: Load, server: Server) -> dict[str, float]:
    text = await load.client.with_options(base_url=server.url).get("/metrics", cast_to=str)
    found = re.findall(r"^deepseek_jax_engine_(\w+) (\S+)$", text, re.M)
    return {name: float(value) for name, value in found}


async def measured(calm: Load, server: Server, asked: argparse.Namespace) -> tuple[float, float]:
    """Tokens a second, and a second of the engine's processors, to as many clients as there are slots."""
    calm.tokens, began, spent = 0, time.monotonic(), server.cpu_seconds()
    await calm.run(asked.slots, asked.measure)
    found = calm.tokens / (time.monotonic() - began), calm.tokens / (server.cpu_seconds() - spent)
    print(f"capacity: {found[0]:,.1f} tokens/s, {found[1]:,.1f} a second of processors", flush=True)
    return found


async def soak(asked: argparse.Namespace, server: Server) -> bool:
    calm = Load(server, 0, leave=0.0)
    await calm.run(asked.slots, asked.measure / 4)  # caches fill
    capacity = [await measured(calm, server, asked)]

    load, memory, began, spent = Load(server, 1, leave=0.1), [], time.monotonic(), server.cpu_seconds()
    before = await engine(load, server)

    async def watch() -> None:
        while True:
            await asyncio.sleep(10)
            memory.append((time.monotonic() - began, server.memory()))
            told = {name: round(size) for name, size in memory[-1][1].items()}
            print(f"{memory[-1][0]:5.0f} s  {load.tokens:8,} tokens  {dict(load.counts)}  MiB {told}", flush=True)

    watching = asyncio.create_task(watch())
    await load.run(asked.clients, asked.seconds)
    seconds = time.monotonic() - began
    spent = server.cpu_seconds() - spent
    watching.cancel()
    await asyncio.sleep(2)
    after = await engine(load, server)
    made = after["tokens_total"] - before["tokens_total"]  # with those of who left
    capacity.append(await measured(calm, server, asked))
    by_time, by_processor = (sum(each) / 2 for each in zip(*capacity, strict=True))
    shares = made / seconds / by_time, made / spent / by_processor
    early = next(sizes for at, sizes in memory if at >= seconds / 4)
    growth = {name: memory[-1][1][name] / size for name, size in early.items()}
    lost = {name: count for name, count in load.counts.items() if name.startswith("lost")}
    left = {name: after[name] for name in ("running", "waiting", "pages_held")}
    checks = {
        f"{made / seconds:,.1f} tokens/s, {shares[0]:.0%} of capacity, by processor time {shares[1]:.0%}": max(shares)
        >= 0.8,
        f"accepted requests lost: {sum(lost.values())} {lost or ''} of {load.counts['ended']}": not lost,
        f"left at the end: {left}": not any(left.values()),
        f"memory from a quarter of the time on: {growth}": max(growth.values()) < GROWTH,
        f"programs compiled while somebody waited: {after['compiles_total']:.0f}": not after["compiles_total"],
    }
    for what, holds in checks.items():
        print(f"{'ok ' if holds else 'NOT'} {what}")
    print(json.dumps({"counts": load.counts, "seconds": seconds, "preemptions": after["preemptions_total"]}))
    return all(checks.values())


def main() -> None:
    asked = options()
    server = Server(asked)
    try:
        fine = asyncio.run(soak(asked, server))
    finally:
        server.process.terminate()
        status = server.process.wait(60)
    print(f"ended with status {status} on {os.cpu_count()} processors")
    sys.exit(not fine or status)


if __name__ == "__main__":
    main()
