"""``bench RECIPE``: the speed of a recipe's model as it is, on what this process has."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from deepseek_jax.cli.longest_kernels import longest_kernels
from deepseek_jax.model.costs import attention_flops, count_parameters, forward_flops
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.sharding import place_batch
from deepseek_jax.saying import terminal
from deepseek_jax.train.optimizer import make_optimizer
from deepseek_jax.train.state import create_state
from deepseek_jax.train.step import make_step
from deepseek_jax.typed import check_least, check_types
from deepseek_jax.workflows.pretrain import PretrainConfig
from deepseek_jax.workflows.recipe import load_recipe
from deepseek_kernels.bench import ceiling

PEAKS = {"NVIDIA H100": 989e12, "NVIDIA H200": 989e12}  # dense bfloat16 FLOP/s by the data sheet


@dataclasses.dataclass(frozen=True)
class ModelBench:
    """Train steps of a recipe's model on random tokens with its own routing, one after another without a pause: the
    mean of ``repeats``, after two that are not timed."""

    recipe: Annotated[PretrainConfig, tyro.conf.arg(name="")]
    work: Literal["train"] = "train"
    """What is timed."""
    segments: int = 0
    """Rows packed from so many documents, which attention, balance and positions keep apart; 0: one a row."""
    repeats: int = 10
    """Steps that are timed."""
    profile: str = ""
    """A folder for a trace of one more call, whose twenty longest kernels are printed."""

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, 1, "repeats")
        if self.segments > self.recipe.data.seq_len:
            raise ValueError(f"segments={self.segments}: must lie in 0…data.seq_len={self.recipe.data.seq_len}")


def run_bench_model(name: str, arguments: Sequence[str]) -> None:
    default = ModelBench(load_recipe(name, PretrainConfig))
    options = tyro.cli(ModelBench, args=list(arguments), default=default, prog=f"deepseek-jax bench {name}")
    facts, step = measure_training(options)
    table = Table(title=f"{name}: {options.work}", show_header=False)
    for fact, value in facts.items():
        table.add_row(fact, value)
    console = terminal()
    console.print(table)
    if options.profile:
        _print_kernels(console, longest_kernels(step, options.profile), options.profile)


def measure_training(options: ModelBench) -> tuple[dict[str, str], Callable[[], Any]]:
    """What to print of the recipe's train step, and a call that takes one more."""
    recipe = options.recipe
    mesh = make_mesh(recipe.mesh)
    with jax.set_mesh(mesh):
        began = time.perf_counter()
        compiled, state, batch = _compile(options, mesh)
        compiling = time.perf_counter() - began
    last: dict[str, jax.Array] = {}

    def call() -> Any:
        nonlocal state, last
        state, last = compiled(state, batch)
        return last

    for _ in range(2):
        first = jax.block_until_ready(call())
    began = time.perf_counter()
    for _ in range(options.repeats):
        call()
    jax.block_until_ready((state, last))
    seconds = (time.perf_counter() - began) / options.repeats
    tokens = recipe.batch_size * recipe.data.seq_len
    flops = tokens * training_flops(options) / seconds / mesh.size
    losses = [float(np.asarray(metrics["loss"])) for metrics in (first, last)]
    facts = {
        "work": _work(options),
        "devices": f"{jax.devices()[0].device_kind} × {mesh.size}",
        **_rates(tokens, seconds, flops, recipe.compute.dtype),
        "peak memory": _peak_memory(compiled),
        "until compiled": f"{compiling:.1f} s, with drawing the weights; less from the compile cache",
        "loss": f"{losses[0]:.6f} in step 2, {losses[1]:.6f} in the last",
    }
    if "max_vio" in last:
        facts["routing"] = f"its own, MaxVio {float(np.asarray(last['max_vio'])):.2f}"
    return facts, call


def _compile(options: ModelBench, mesh: Mesh) -> tuple[Any, Any, Any]:
    """The compiled step, its first state and a batch."""
    recipe, compute = options.recipe, options.recipe.compute.on(mesh)
    loss = dataclasses.replace(recipe.loss, isolate=recipe.loss.isolate or options.segments > 0)
    optimizer = make_optimizer(recipe.optimizer, recipe.model, recipe.loop.steps)
    state = create_state(recipe.model, optimizer, mesh, compute=compute, seed=recipe.seed)
    batch = place_batch(random_batch(options), mesh, compute.rules)
    step = make_step(recipe.model, loss, optimizer, recipe.step, compute=compute)
    return jax.jit(step, donate_argnums=0).lower(state, batch).compile(), state, batch


def _work(options: ModelBench) -> str:
    recipe = options.recipe
    rows = f"{recipe.batch_size} × {recipe.data.seq_len} tokens"
    rows += f" in {options.segments} segments a row" if options.segments else ""
    return f"{rows}, {count_parameters(recipe.model)['parameters_total']:,} parameters, {recipe.compute.dtype}"


def training_flops(options: ModelBench) -> float:
    """Per token: three times the forward pass, in which a token attends to half of its segment on average. What is
    computed a second time does not count."""
    segments_BS = random_batch(options)["segment_ids"]
    longest = int(segments_BS.max()) + 1
    sizes = np.concatenate([np.bincount(row, minlength=longest) for row in segments_BS])
    context = round(float(np.sum(sizes.astype(np.float64) ** 2) / segments_BS.size / 2))
    return 3 * (forward_flops(options.recipe.model) + attention_flops(options.recipe.model, context))


def random_batch(options: ModelBench) -> dict[str, np.ndarray]:
    """Rows of random tokens, cut at random places where ``segments`` asks for it."""
    recipe, rng = options.recipe, np.random.default_rng(0)
    shape = rows, size = recipe.batch_size, recipe.data.seq_len
    tokens = rng.integers(0, recipe.model.vocab_size, shape, np.int32)
    starts = np.zeros(shape, bool)
    starts[:, 0] = True
    for row in range(rows):
        starts[row, rng.choice(np.arange(1, size), max(options.segments - 1, 0), replace=False)] = True
    place = np.broadcast_to(np.arange(size, dtype=np.int32), shape)
    return {
        "tokens": tokens,
        "segment_ids": np.cumsum(starts, axis=1, dtype=np.int32),
        "positions": place - np.maximum.accumulate(np.where(starts, place, 0), axis=1),
        "loss_mask": np.ones(shape, np.float32),
    }


def _rates(tokens: int, seconds: float, flops: float, dtype: str) -> dict[str, str]:
    kind = jax.devices()[0].device_kind
    top = ceiling(jnp.dtype(dtype), 1024 if jax.devices()[0].platform == "cpu" else 8192, 5)
    peak = PEAKS.get(kind.removesuffix(" 80GB HBM3"))
    share = f"{flops / top:.0%} of a dense product's {top / 1e12:.3g} in this run"
    mfu = f"; MFU {flops / peak:.1%} of {peak / 1e12:.0f}" if peak else ""
    return {
        "tokens a second": f"{tokens / seconds:,.0f}",
        "time": f"{1e3 * seconds:.1f} ms",
        "model's arithmetic": f"{flops / 1e12:.3g} TFLOP/s a device, {share}{mfu}",
    }


def _peak_memory(compiled: Any) -> str:
    """Arguments, results and temporary arrays of the program: what it needs, whatever else this process holds."""
    found = compiled.memory_analysis()
    if found is None:
        return "unknown"
    size = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return f"{(size + found.temp_size_in_bytes) / 2**30:.1f} GiB a device"


def _print_kernels(console: Console, kernels: list, folder: str) -> None:
    total = sum(kernel.seconds for kernel in kernels)
    if not kernels:
        console.print(f"{folder}: the trace has no kernels of an accelerator")
        return
    console.print(f"{1e3 * total:.1f} ms of {len(kernels)} kernels (the trace: {folder})")
    for kernel in kernels[:20]:
        share = kernel.seconds / total
        line = f"{1e3 * kernel.seconds:9.2f} ms {share:6.1%} ×{kernel.calls:<5} {kernel.name[:90]}"
        console.print(line)
