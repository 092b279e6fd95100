"""``bench RECIPE --work train``: train steps on random tokens."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from deepseek_jax.cli.bench_report import Measured, peak_memory, rates
from deepseek_jax.model.costs import attention_flops, count_parameters, forward_flops
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.sharding import place_batch
from deepseek_jax.train.optimizer import make_optimizer
from deepseek_jax.train.state import create_state
from deepseek_jax.workflows.pretrain import PretrainConfig
from deepseek_jax.workflows.stage_step import abstract_step


@dataclasses.dataclass(frozen=True)
class Steps:
    """What some train steps one after another gave."""

    seconds: float
    """Of one of those that were timed."""
    every: list[dict[str, np.ndarray]]
    """The metrics of each, two that were not timed first."""
    call: Callable[[], Any]
    """One more."""

    @property
    def losses(self) -> list[float]:
        return [float(metrics["loss"]) for metrics in self.every]


def measure_training(recipe: PretrainConfig, *, segments: int = 0, repeats: int = 10) -> Measured:
    """The recipe's train step, with its own routing: the mean of ``repeats`` one after another without a pause, after
    two that are not timed.

    segments: see ``random_batch``.
    """
    mesh = make_mesh(recipe.mesh)
    began = time.perf_counter()
    compiled = lowered_step(recipe, mesh, segments).compile()
    compiling = time.perf_counter() - began
    found = run_steps(recipe, mesh, compiled, segments=segments, repeats=repeats)
    tokens, last = recipe.batch_size * recipe.data.seq_len, found.every[-1]
    flops = tokens * training_flops(recipe, segments) / found.seconds / mesh.size
    facts = {
        "work": _work(recipe, segments),
        **rates(tokens, found.seconds, flops, recipe.compute.dtype),
        "peak memory": peak_memory(compiled),
        "until compiled": f"{compiling:.1f} s; less from the compile cache",
        "loss": f"{found.losses[1]:.6f} in step 2, {found.losses[-1]:.6f} in the last",
    }
    if "max_vio" in last:
        facts["routing"] = f"its own, MaxVio {last['max_vio']:.2f}"
    if "dropped_sum" in last:
        facts["routing"] += f", {dropped_share(recipe, last):.2%} of the choices dropped"
    return Measured(facts, found.call)


def lowered_step(recipe: PretrainConfig, mesh: Mesh, segments: int = 0) -> jax.stages.Lowered:
    """The step that a run of the recipe takes; no array is made."""
    loss = dataclasses.replace(recipe.loss, isolate=recipe.loss.isolate or segments > 0)
    with jax.set_mesh(mesh):
        built = abstract_step(recipe, recipe.model, loss, mesh, recipe.data.seq_len)
        return built.step.lower(built.state, built.batch)


def run_steps(recipe: PretrainConfig, mesh: Mesh, compiled: Any, *, segments: int = 0, repeats: int = 10) -> Steps:
    """Fresh parameters, and steps of a compiled ``lowered_step`` on one batch of random tokens."""
    compute = recipe.compute.on(mesh)
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(recipe.optimizer, recipe.model, recipe.loop.steps)
        ema = recipe.step.ema_decay > 0
        state = create_state(recipe.model, optimizer, mesh, compute=compute, seed=recipe.seed, ema=ema)
        batch = place_batch(random_batch(recipe, segments), mesh, compute.rules)
    every: list[dict[str, jax.Array]] = []

    def call() -> Any:
        nonlocal state
        state, metrics = compiled(state, batch)
        every.append(metrics)
        return metrics

    for _ in range(2):
        jax.block_until_ready(call())
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    jax.block_until_ready((state, every))
    seconds = (time.perf_counter() - began) / repeats
    return Steps(seconds, [jax.device_get(metrics) for metrics in every], call)


def dropped_share(recipe: PretrainConfig, metrics: dict[str, np.ndarray]) -> float:
    """Of a step's choices (token, expert), those that were dropped."""
    tokens = recipe.batch_size * recipe.data.seq_len
    return float(metrics["dropped_sum"]) / (tokens * recipe.model.num_experts_per_tok * metrics["dropped"].size)


def _work(recipe: PretrainConfig, segments: int) -> str:
    rows = f"{recipe.batch_size} × {recipe.data.seq_len} tokens"
    rows += f" in {segments} segments a row" if segments else ""
    return f"{rows}, {count_parameters(recipe.model)['parameters_total']:,} parameters, {recipe.compute.dtype}"


def training_flops(recipe: PretrainConfig, segments: int = 0) -> float:
    """Per token: three times the forward pass, in which a token attends to half of its segment on average. What is
    computed a second time does not count."""
    segments_BS = random_batch(recipe, segments)["segment_ids"]
    longest = int(segments_BS.max()) + 1
    sizes = np.concatenate([np.bincount(row, minlength=longest) for row in segments_BS])
    context = round(float(np.sum(sizes.astype(np.float64) ** 2) / segments_BS.size / 2))
    return 3 * (forward_flops(recipe.model) + attention_flops(recipe.model, context))


def random_batch(recipe: PretrainConfig, segments: int = 0) -> dict[str, np.ndarray]:
    """Rows of random tokens, cut at random places into so many ``segments`` each, where any are asked for."""
    rng = np.random.default_rng(0)
    shape = rows, size = recipe.batch_size, recipe.data.seq_len
    tokens = rng.integers(0, recipe.model.vocab_size, shape, np.int32)
    starts = np.zeros(shape, bool)
    starts[:, 0] = True
    for row in range(rows):
        starts[row, rng.choice(np.arange(1, size), max(segments - 1, 0), replace=False)] = True
    place = np.broadcast_to(np.arange(size, dtype=np.int32), shape)
    return {
        "tokens": tokens,
        "segment_ids": np.cumsum(starts, axis=1, dtype=np.int32),
        "positions": place - np.maximum.accumulate(np.where(starts, place, 0), axis=1),
        "loss_mask": np.ones(shape, np.float32),
    }
