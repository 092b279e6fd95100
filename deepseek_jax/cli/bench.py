"""``bench``: tokens a second of a model's train step and decode, beside transformers on the same machine.

With a recipe in front, ``bench RECIPE --work …``, it is bench_model's: one kind of work, of a model of any size;
``bench serve URL`` is bench_serve's: a server under load.
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import tyro
from rich.table import Table

from deepseek_jax.cli.bench_peer import ask_peer
from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.inference.generate import generate
from deepseek_jax.inference.requests import make_requests
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.inference.weights import sampling_config, sampling_weights
from deepseek_jax.model import parameters
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.saying import terminal
from deepseek_jax.train.losses import LanguageModelLoss
from deepseek_jax.train.optimizer import OptimizerConfig, make_optimizer
from deepseek_jax.train.state import create_state
from deepseek_jax.train.step import StepConfig, make_step
from deepseek_jax.workflows.pretrain import PretrainConfig
from deepseek_jax.workflows.recipe import load_recipe


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """Speed of a recipe's model in training, without MTP as the peer and with, and in greedy decoding."""

    recipe: str = "demo/pretrain"
    """Of the model: of pretraining."""
    rows: int = 8
    """Of a train step."""
    seq: int = 128
    """Tokens of a row."""
    prompt: int = 32
    """Tokens of a prompt before decoding."""
    new_tokens: int = 96
    """Tokens to decode."""
    decode_batches: tuple[int, ...] = (64, 1)
    """Answers decoded side by side."""
    repeats: int = 10
    """Of each measurement; the median counts."""
    rounds: int = 3
    """How often this and the peer take turns; the median of the ratios counts."""
    peer_python: str = ""
    """A Python with torch and transformers (make peer) to measure DeepseekV3ForCausalLM of the same configuration with;
    empty for none."""


def run_bench(arguments: Sequence[str]) -> None:
    if arguments and arguments[0] == "serve":
        from deepseek_jax.cli.bench_serve import run_bench_serve

        return run_bench_serve(arguments[1:])
    if arguments and not arguments[0].startswith("-"):
        from deepseek_jax.cli.bench_model import run_bench_model

        return run_bench_model(arguments[0], arguments[1:])
    options = tyro.cli(BenchConfig, args=list(arguments), prog="deepseek-jax bench")
    recipe = load_recipe(options.recipe, PretrainConfig)
    model, compute = recipe.model, recipe.compute
    ours, peers = [], []
    for _ in range(options.rounds if options.peer_python else 1):
        ours.append(measure(model, compute, options))
        if options.peer_python:
            peers.append(measure_peer(model, options))
    table = Table(title=f"{options.recipe}: tokens/s, {jax.devices()[0].device_kind} × {jax.device_count()}")
    for column in ("work", "deepseek-jax", "transformers", "ratio"):
        table.add_column(column, justify="left" if column == "work" else "right")
    for work in ours[0]:
        mine = [found[work] for found in ours]
        if not peers:
            table.add_row(work, f"{statistics.median(mine):,.0f}", "–", "–")
            continue
        theirs = [found[work if work in found else _train_work(options)] for found in peers]
        ratio = statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
        table.add_row(work, f"{statistics.median(mine):,.0f}", f"{statistics.median(theirs):,.0f}", f"{ratio:.2f}×")
    console = terminal()
    console.print(table)
    console.print(
        f"decode: prompt {options.prompt}, {options.new_tokens} new tokens, greedy; {compute.dtype}; "
        f"load average {os.getloadavg()[0]:.1f}"
    )


def measure(model: ModelConfig, compute: ComputeConfig, options: BenchConfig) -> dict[str, float]:
    """Our tokens per second by kind of work: of the network that the peer trains, and of it with its MTP modules."""
    alone = dataclasses.replace(model, num_nextn_predict_layers=0)
    found = {_train_work(options): _train_speed(alone, compute, options)}
    if model.num_nextn_predict_layers:
        found[f"{_train_work(options)}, ours with MTP"] = _train_speed(model, compute, options)
    for batch in options.decode_batches:
        found[f"decode, batch {batch}"] = _decode_speed(model, compute, options, batch)
    return found


def _train_work(options: BenchConfig) -> str:
    return f"train {options.rows}×{options.seq}"


def _median_seconds(call: Callable[[], Any], repeats: int) -> float:
    call()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _train_speed(model: ModelConfig, compute: ComputeConfig, options: BenchConfig) -> float:
    mesh = make_mesh(devices=jax.devices()[:1])
    optimizer = make_optimizer(OptimizerConfig(), model, 100)
    state = create_state(model, optimizer, mesh, compute=compute)
    loss = LanguageModelLoss(chunk=options.seq // 2)
    step = jax.jit(make_step(model, loss, optimizer, StepConfig(), compute=compute), donate_argnums=0)
    shape = (options.rows, options.seq)
    batch = {
        "tokens": np.random.default_rng(0).integers(0, model.vocab_size, shape, np.int32),
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(options.seq, dtype=np.int32), shape),
        "loss_mask": np.ones(shape, np.float32),
    }

    def call() -> None:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))

    return options.rows * options.seq / _median_seconds(call, options.repeats)


def _decode_speed(model: ModelConfig, compute: ComputeConfig, options: BenchConfig, batch: int) -> float:
    mesh = make_mesh(devices=jax.devices()[:1])
    compute = compute.on(mesh)
    params, router_bias = jax.jit(lambda: parameters.init(model))()
    weights = sampling_weights(params, router_bias, config=model, compute=compute, mesh=mesh)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, model.vocab_size, options.prompt).tolist() for _ in range(batch)]
    sampling = SamplingParams(temperature=0.0, max_tokens=options.new_tokens)
    requests = make_requests(prompts, sampling, pad_id=2)

    def call() -> None:
        jax.block_until_ready(generate(sampling_config(model), compute, *weights, requests))

    return batch * options.new_tokens / _median_seconds(call, max(3, options.repeats // 2))


def measure_peer(model: ModelConfig, options: BenchConfig) -> dict[str, float]:
    """The peer's tokens per second, measured in a process of its own."""
    found = ask_peer(
        options.peer_python,
        model,
        rows=options.rows,
        seq=options.seq,
        steps=options.repeats,
        decode_batches=list(options.decode_batches),
        prompt=options.prompt,
        new_tokens=options.new_tokens,
    )
    result = {_train_work(options): found["train"]["tokens_per_second"]}
    for batch in options.decode_batches:
        result[f"decode, batch {batch}"] = found["decode"][str(batch)]["tokens_per_second"]
    return result
