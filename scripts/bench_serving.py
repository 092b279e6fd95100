"""A server from its start to its last answer: how soon it is ready, and how fast at several concurrencies.

    python scripts/bench_serving.py models/deepseek_v2_lite --at-once 64 256 --starts 2 --ids 100000 -- --random \
      --compute.dtype bfloat16 --compute.scan-decode --compute.scan-unroll 26 --serving.slots 256 --serving.pages 4096 \
      --serving.context 2304 --serving.chunk 8192

Starts ``deepseek-jax serve`` with what stands behind ``--``, as often as asked; with --cache DIR, which begins empty,
the first start compiles and the others find it all. The last one is asked by four times as many requests as are under
way at once, each time others, and then for one sample and for 16 of a prompt of --group tokens. Prints a line for each,
and all of them again at its end.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from deepseek_jax.cli.bench_serve import BenchServeConfig, measure

TABLE: list[str] = []


def say(line: str) -> None:
    TABLE.append(line)
    print(line, flush=True)


class Server:
    """Ready, and ended by SIGTERM."""

    def __init__(self, asked: argparse.Namespace):
        command = [sys.executable, "-m", "deepseek_jax.cli.main", "serve", asked.model, "--port", "0", *asked.more]
        cache = {"JAX_COMPILATION_CACHE_DIR": asked.cache} if asked.cache else {}
        began = time.monotonic()
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | cache)
        assert self.process.stderr is not None
        for line in self.process.stderr:
            print(line, end="", flush=True)
            if found := re.search(r"ready: (\S+)/v1 has .*; (.*)", line):
                self.url = f"{found[1]}/v1"
                say(f"ready after {time.monotonic() - began:.1f} s: {found[2]}")
                break
        else:
            sys.exit("it has not come up")
        threading.Thread(target=self.process.stderr.read, daemon=True).start()  # it must not stand still for a reader

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


def bench(server: Server, name: str, **options: Any) -> None:
    found = measure(BenchServeConfig(server.url, **options))
    first, token = (found[what] for what in ("time to first token", "a token"))
    say(
        f"{name:24s} {found['output tokens a second']:9,.1f} tokens/s; to the first {1e3 * first['p50']:.0f}, p95 "
        f"{1e3 * first['p95']:.0f} ms; a token {1e3 * token['p50']:.1f}, p95 {1e3 * token['p95']:.1f} ms; "
        f"{found['found']:.0%} of prompts found; {found['answered']} of {found['requests']} answered"
    )
    for why, many in found["failures"].items():
        say(f"failed, {many} times: {why}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="what serve is given: a folder, or a recipe with --random behind --")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--starts", type=int, default=1)
    parser.add_argument("--cache", default="", help="folder of compiled programs")
    parser.add_argument("--input-tokens", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=256)
    parser.add_argument("--group", type=int, default=0, help="tokens of a prompt that is asked for 16 samples")
    parser.add_argument("--ids", type=int, default=1000, help="random ids are below it")
    parser.add_argument("--repeats", type=int, default=2)
    words = [*sys.argv[1:], "--"]
    asked = parser.parse_args(words[: words.index("--")])
    asked.more = words[words.index("--") + 1 : -1]
    for _ in range(asked.starts - 1):
        with Server(asked):
            pass
    with Server(asked) as server:
        sizes: dict[str, Any] = {
            "input_tokens": asked.input_tokens,
            "output_tokens": asked.output_tokens,
            "ids": asked.ids,
        }
        for turn in range(asked.repeats):
            for count in asked.at_once:
                seed = 1000 * turn + count  # prompts of its own: none is found
                bench(server, f"{count} at once", concurrency=count, seed=seed, processes=1 + count // 32, **sizes)
        if asked.group:
            one: dict[str, Any] = {"concurrency": 1, "requests": 1, "ids": asked.ids, "input_tokens": asked.group}
            one |= {"output_tokens": 64, "temperature": 1.0}
            bench(server, "one prompt, one sample", seed=1, **one)
            bench(server, "one prompt, 16 samples", seed=2, body='{"n": 16}', **one)
    print("\n".join(["", *TABLE]))


if __name__ == "__main__":
    main()
