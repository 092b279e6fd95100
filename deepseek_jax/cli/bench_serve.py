"""``bench serve``: what a server of OpenAI's kind does under load."""

import asyncio
import collections
import dataclasses
import json
import os
import random
import statistics
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.table import Table

from deepseek_jax.cli.bench_client import Answer, Load, send_by_processes, split
from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.model.costs import bytes_of_step
from deepseek_jax.saying import terminal
from deepseek_jax.typed import check_least, check_types
from deepseek_jax.workflows.recipe import load_recipe

KEY = "OPENAI_API_KEY"


@dataclasses.dataclass(frozen=True)
class BenchServeConfig:
    """Replays arrivals against any server of OpenAI's kind, streaming, and prints the time to the first token, the time
    between tokens, output tokens a second and failures."""

    url: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="URL")]
    """Of the server, up to and with /v1: http://127.0.0.1:8000/v1."""
    model: str = ""
    """What the server calls it; by default the first that its /models lists."""
    endpoint: Literal["chat", "completions"] = "completions"
    """Which is asked: /chat/completions, or /completions."""
    prompts: Literal["ids", "words"] = "ids"
    """Random token ids, exactly as many as asked for, which completions alone take; or random words, about as many."""
    prompts_file: str = ""
    """Instead a file with a prompt a line, as JSON: a text, or a list of ids; they are taken one after another."""
    ids: int = 1000
    """Random ids are below it: at most the vocabulary."""
    concurrency: int = 16
    """Requests that are under way at once: whoever has its answer sends the next."""
    rate: float = 0.0
    """Instead of a closed loop, requests a second by a Poisson process, however many are under way."""
    requests: int = 0
    """In all; 0: four times the concurrency."""
    input_tokens: int = 512
    """Of a prompt."""
    output_tokens: int = 256
    """Of an answer, at most: max_tokens."""
    warm_up: int = 1
    """Requests before, one after another, that are not counted."""
    temperature: float = 0.0
    """0: greedy."""
    body: str = "{}"
    """JSON of further fields of each request: {"logit_bias": {"2": -100}} forbids the token 2."""
    timeout: float = 600.0
    """Seconds, after which a request has failed."""
    processes: int = 1
    """Client processes; one reads some 100,000 events a second."""
    recipe: str = ""
    """Of the network that is served (models/deepseek_v2_lite, or a released model's config.json), to say which share
    of what the bandwidth allows is reached."""
    bandwidth: float = 0.0
    """With recipe: GB/s that the device reads with, by a copy in the same minutes rather than by a data sheet."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """With recipe: of the weights and of the cache."""
    seed: int = 0
    """Of the prompts and arrivals."""
    json: str = ""
    """A file for all that is printed, as JSON."""

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, 1, "concurrency", "input_tokens", "output_tokens", "processes", "ids", "timeout")
        check_least(self, 0, "requests", "warm_up", "rate", "bandwidth")
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url={self.url!r}: expected http://HOST:PORT/v1")
        if self.endpoint == "chat" and self.prompts == "ids" and not self.prompts_file:
            raise ValueError("endpoint='chat' takes no ids: --prompts words")
        if bool(self.recipe) != bool(self.bandwidth):
            raise ValueError("the share of the bandwidth takes both --recipe and --bandwidth")
        if self.recipe and self.rate:
            raise ValueError(f"rate={self.rate:g}: the share of the bandwidth is of --concurrency rows, a closed loop")
        if not isinstance(json.loads(self.body), dict):
            raise ValueError(f"body={self.body!r}: expected a JSON object")


def run_bench_serve(arguments: Sequence[str]) -> None:
    options = tyro.cli(BenchServeConfig, args=list(arguments), prog="deepseek-jax bench serve")
    found = measure(options)
    console, table = terminal(), Table(title=f"{options.url}: {found['work']}")
    for column in ("", "p50", "p95", "p99"):
        table.add_column(column, justify="left" if not column else "right")
    for what in ("time to first token", "between events", "a token", "whole answer"):
        table.add_row(f"{what}, ms", *(f"{1e3 * found[what][p]:,.1f}" for p in ("p50", "p95", "p99")))
    console.print(table)
    console.print(
        f"{found['output tokens a second']:,.1f} output tokens/s, {found['input tokens a second']:,.1f} of prompts; "
        f"{found['answered']} of {found['requests']} requests answered in {found['seconds']:.1f} s, "
        f"{found['output tokens']:,} tokens in {found['events']:,} events; client {found['client']:.0%} of a core"
    )
    if found["found"]:
        console.print(f"{found['found']:.0%} of the prompts were found in the server's cache (--seed asks others)")
    for why, count in found["failures"].items():
        console.print(f"failed, {count} times: {why}")
    if "bound" in found:
        console.print(
            f"{found['share']:.1%} of the {found['bound']:,.0f} tokens/s that {options.bandwidth:g} GB/s allow for "
            f"{found['step bytes'] / 1e9:.3g} GB a step of {options.concurrency} rows, with no time for prompts"
        )
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=2) + "\n")
    if not found["answered"]:
        raise RuntimeError(f"no request was answered: {next(iter(found['failures']))}")


def measure(options: BenchServeConfig) -> dict[str, Any]:
    """Send the load -> what ``bench serve`` prints, by name; seconds, but for what says otherwise."""
    key = os.environ.get(KEY, "")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    count = options.requests or 4 * options.concurrency
    model = options.model or _first_model(options.url, headers)
    bodies = [json.dumps(body) for body in _bodies(options, model, options.warm_up + count)]
    url = options.url.rstrip("/") + {"chat": "/chat/completions", "completions": "/completions"}[options.endpoint]
    timed: dict[str, Any] = {"headers": headers, "timeout": options.timeout, "seed": options.seed}
    if options.warm_up:
        before = Load(url, bodies[: options.warm_up], concurrency=1, rate=0.0, **timed)
        failed = [answer.failure for answer in asyncio.run(send_by_processes([before])) if answer.failure]
        if failed:
            random = options.prompts == "ids" and not options.prompts_file
            hint = f" (random ids are below --ids {options.ids})" if random and "status 400" in failed[0] else ""
            raise RuntimeError(f"{options.url}: {failed[0]}{hint}")
    load = Load(url, bodies[options.warm_up :], concurrency=options.concurrency, rate=options.rate, **timed)
    spent = sum(os.times()[:4])
    answers = asyncio.run(send_by_processes(split(load, options.processes)))
    spent = sum(os.times()[:4]) - spent
    arriving = f"{options.rate:g} a second" if options.rate else f"{options.concurrency} at once"
    found = figures(answers)
    found["work"] = f"{count} requests, {arriving}, {options.input_tokens} in, {options.output_tokens} out"
    found["client"] = spent / max(found["seconds"], 1e-9)
    if options.recipe and found["answered"]:
        context = options.input_tokens + found["output tokens"] / found["answered"] / 2
        compute = ComputeConfig(dtype=options.dtype)
        size = bytes_of_step(_network(options.recipe), compute, options.concurrency, context)
        found["step bytes"], found["bound"] = size, options.concurrency * 1e9 * options.bandwidth / size
        found["share"] = found["output tokens a second"] / found["bound"]
    return found


def figures(answers: Sequence[Answer]) -> dict[str, Any]:
    """Of all answers: rates from the first request's sending to the last answer's end; times of those that came whole.
    ``between events`` is what a client sees, several tokens at once or one; ``a token`` is an answer's time behind its
    first event, by its tokens."""
    whole = [answer for answer in answers if not answer.failure and answer.came]
    failures = collections.Counter(
        answer.failure or "an answer without text" for answer in answers if answer.failure or not answer.came
    )
    last = max((answer.came[-1] for answer in whole), default=0.0)
    seconds = max(last - min((answer.sent for answer in answers), default=0.0), 0.0)
    tokens, prompts = sum(answer.tokens for answer in whole), sum(answer.prompt for answer in whole)
    gaps = [b - a for answer in whole for a, b in zip(answer.came, answer.came[1:], strict=False)]
    each = [(answer.came[-1] - answer.came[0]) / (answer.tokens - 1) for answer in whole if answer.tokens > 1]
    return {
        "requests": len(answers),
        "answered": len(whole),
        "failures": dict(failures.most_common(5)),
        "seconds": seconds,
        "output tokens": tokens,
        "events": sum(len(answer.came) for answer in whole),
        "output tokens a second": tokens / seconds if seconds else 0.0,
        "input tokens a second": prompts / seconds if seconds else 0.0,
        "found": sum(answer.found for answer in whole) / prompts if prompts else 0.0,
        "time to first token": percentiles([answer.came[0] - answer.sent for answer in whole]),
        "between events": percentiles(gaps),
        "a token": percentiles(each),
        "whole answer": percentiles([answer.came[-1] - answer.sent for answer in whole]),
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99; of none, NaN."""
    if len(values) < 2:
        only = values[0] if values else float("nan")
        return {"p50": only, "p95": only, "p99": only}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98]}


def _bodies(options: BenchServeConfig, model: str, count: int) -> list[dict[str, Any]]:
    rng = random.Random(options.seed)
    shared = {"model": model, "max_tokens": options.output_tokens, "temperature": options.temperature}
    shared |= {"stream": True, "stream_options": {"include_usage": True}, **json.loads(options.body)}
    given = []
    if options.prompts_file:
        lines = Path(options.prompts_file).read_text(encoding="utf-8").split("\n")
        given = [json.loads(line) for line in lines if line.strip()]

    def word() -> str:
        return "".join(rng.choices(string.ascii_lowercase, k=3))

    def prompt(i: int) -> Any:
        if given:
            return given[i % len(given)]
        if options.prompts == "ids":
            return [rng.randrange(options.ids) for _ in range(options.input_tokens)]
        return " ".join(word() for _ in range(max(options.input_tokens // 2, 1)))  # a made-up word is about two tokens

    asked = [prompt(i) for i in range(count)]
    if options.endpoint == "chat":
        return [shared | {"messages": [{"role": "user", "content": text}]} for text in asked]
    return [shared | {"prompt": each} for each in asked]


def _first_model(url: str, headers: dict[str, str]) -> str:
    from urllib.request import Request, urlopen

    with urlopen(Request(url.rstrip("/") + "/models", headers=headers), timeout=30) as answer:
        return json.load(answer)["data"][0]["id"]


def _network(recipe: str) -> ModelConfig:
    if recipe.endswith(".json"):
        return ModelConfig.from_hf(json.loads(Path(recipe).read_text(encoding="utf-8")))
    made: Any = load_recipe(recipe, object)
    return getattr(made, "model", made)
