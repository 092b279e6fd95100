"""What several GPUs of one host do, part by part, each with a table at its end: on all GPUs that CUDA_VISIBLE_DEVICES
shows, with this repository and its kernels/ on PYTHONPATH.

    python3 scripts/bench_mesh_parts.py dispatch   tokens to their experts and back, beside the collectives alone
    python3 scripts/bench_mesh_parts.py decode     V2-Lite, experts apart, 64 to 512 rows
    python3 scripts/bench_mesh_parts.py v3-decode  V3's widths, 256 rows
    python3 scripts/bench_mesh_parts.py v3-train   V3's widths, a row of 4,096 tokens a device
    python3 scripts/bench_mesh_parts.py context    a row of 32,768 tokens through a layer of MLA, by one GPU and by all

--small: tiny sizes, for a try on emulated devices.
"""

import argparse
import dataclasses
import functools
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax.cli.bench_inference import TRACED, measure_decoding
from deepseek_jax.cli.bench_report import Measured
from deepseek_jax.cli.bench_training import measure_training
from deepseek_jax.cli.longest_kernels import longest_kernels
from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.model.mla import MLA
from deepseek_jax.model.rope import rotary_tables
from deepseek_jax.parallel.context import RowOrder
from deepseek_jax.parallel.dispatch import Dispatch, Hop, by_copies, by_gathering, lay_out
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh
from deepseek_jax.workflows.pretrain import PretrainConfig
from deepseek_jax.workflows.recipe import load_recipe
from deepseek_kernels import Visible
from deepseek_kernels.experts_sorted import gather_rows, sum_rows

BEGAN = time.monotonic()
TABLE: list[str] = []
EXPERT = PartitionSpec("expert")
TINY: dict[str, Any] = dict(
    hidden_size=64, vocab_size=256, intermediate_size=64, moe_intermediate_size=32, num_attention_heads=2
)
DECOMPOSED = {"xla_gpu_unsupported_enable_ragged_all_to_all_decomposer": True}
BY_COPIES = {"xla_gpu_use_memcpy_local_p2p": True}
# For the predictions, GB/s a device: what leaves it by each collective, and its own memory.
LATENCY, ALL_TO_ALL, ALL_GATHER, MEMORY = 0.02, 230, 300, 2300


def say(line: str) -> None:
    TABLE.append(line)
    print(f"[{time.monotonic() - BEGAN:5.0f} s] {line}", flush=True)


def tried(name: str, work: Callable[[], Any]) -> Any:
    """A row that fails leaves the others."""
    try:
        return work()
    except Exception as error:
        say(f"{name:54s} failed: {str(error)[:300]!r}")
        return None


# Dispatch


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Tokens of ``ways`` devices for 64 experts, K = 6; copies find room for as many as come on average."""

    ways: int
    tokens: int
    width: int
    top: int = 6
    experts: int = 64

    @property
    def own(self) -> int:
        return self.experts // self.ways

    @property
    def rows(self) -> int:
        return max(8, Dispatch("all_to_all", 1.0).rows(self.tokens, self.top, self.ways) // 8 * 8)

    @property
    def mesh(self):
        return make_mesh(MeshConfig(expert=self.ways))

    def hop(self, how: str = "all_to_all") -> Hop:
        here = jax.lax.axis_index("expert")
        axis = "expert" if how == "puts" else ""
        return Hop(("expert",), [[*range(self.ways)]], here, self.ways, self.own, self.rows, axis)

    def around(self, how: Any, x: jax.Array, weights: jax.Array, experts: jax.Array) -> jax.Array:
        """There and back, nothing between but what keeps a compiler from leaving either out."""
        local = lambda x, w, e: x * (1 + jnp.max(e, axis=1, keepdims=True) // self.experts).astype(x.dtype)  # noqa: E731
        options: dict[str, Any] = {"dispatch": Dispatch(how, 1.0)}
        return by_copies(local, (x, weights, experts), ("expert",), self.ways, self.own, **options)[0]

    def on_devices(self, function: Callable[..., Any], operands: int, out: Any = EXPERT) -> Any:
        specs = {"in_specs": (EXPERT,) * operands, "out_specs": out}
        return jax.jit(jax.shard_map(function, mesh=self.mesh, **specs, check_vma=False))

    def put(self, array: Any) -> jax.Array:
        return jax.device_put(array, NamedSharding(self.mesh, EXPERT))

    def drawn(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        rng, count = np.random.default_rng(0), self.ways * self.tokens
        experts = np.argsort(rng.random((count, self.experts)), axis=1)[:, : self.top]
        x = self.put(rng.standard_normal((count, self.width), np.float32).astype(jnp.bfloat16))
        return x, self.put(rng.random((count, self.top), np.float32)), self.put(experts.astype(np.int32))

    def sent(self, copies: bool) -> float:
        """Bytes of tokens that leave a device, one way."""
        return 2 * (self.ways - 1) * (self.rows if copies else self.tokens) * self.width


def clock(name: str, run: Any, *operands: Any, sent: float = 0, predicted: float = 0, **options: Any) -> Any:
    def work() -> Any:
        compiled = run.lower(*operands).compile(compiler_options=options or None)
        jax.block_until_ready([compiled(*operands) for _ in range(2)])
        best = math.inf
        for _ in range(3):
            began = time.perf_counter()
            out = [compiled(*operands) for _ in range(20)][-1]
            jax.block_until_ready(out)
            best = min(best, (time.perf_counter() - began) / 20)
        rate = f"{sent / best / 1e9:6.0f} GB/s" if sent else " " * 11
        say(f"{name:54s} {1e3 * best:8.3f} ms {rate}" + (f"   predicted {predicted:6.3f}" if predicted else ""))
        return out

    return tried(name, work)


def dispatch(small: bool) -> None:
    it = Exchange(jax.device_count(), *((64, 256) if small else (16_384, 2_048)))
    copies_sent, all_sent = it.sent(True), it.sent(False)
    row = 2 * it.width * it.ways * it.rows / MEMORY / 1e6  # ms to read or write the buffer
    swap_ms, gather_ms = LATENCY + copies_sent / ALL_TO_ALL / 1e6, LATENCY + all_sent / ALL_GATHER / 1e6
    say(f"{it.tokens} tokens × {it.width} a device, K = {it.top}, {it.experts} experts; {it.rows} rows to each device")
    x, weights, experts = it.drawn()
    buffer = it.put(jnp.zeros((it.ways**2 * it.rows, it.width), jnp.bfloat16))
    swap = it.on_devices(lambda b: it.hop().swap(b), 1)
    clock("dense all_to_all", swap, buffer, sent=copies_sent, predicted=swap_ms)

    def ragged(b: jax.Array) -> jax.Array:
        me, start = jax.lax.axis_index("expert"), jnp.arange(it.ways, dtype=jnp.int32) * it.rows
        sizes, there = jnp.full(it.ways, it.rows, jnp.int32), jnp.full(it.ways, me * it.rows, jnp.int32)
        return jax.lax.ragged_all_to_all(b, jnp.zeros_like(b), start, sizes, there, sizes, axis_name="expert")

    clock("ragged_all_to_all", it.on_devices(ragged, 1), buffer, sent=copies_sent, predicted=copies_sent / 8e6)
    options: dict[str, Any] = {"sent": copies_sent, "predicted": copies_sent / 55e6, **DECOMPOSED}
    clock("ragged_all_to_all, decomposer", it.on_devices(ragged, 1), buffer, **options)

    def places(e: jax.Array) -> Any:
        copies, dropped = lay_out(e, it.ways, it.own, it.rows)
        return copies, dropped[None]

    laid = clock("  laying out", it.on_devices(places, 1), experts, predicted=0.04)
    keys = experts[:, : min(it.ways, it.top)].reshape(-1)
    clock("  a sort of as many keys", it.on_devices(jnp.sort, 1), keys)
    there = it.on_devices(lambda x, w, e: it.hop().there(x, w, e)[0], 3)
    here = tried("dispatching", lambda: there(x, weights, experts))
    if laid and here:
        say(f"  choices dropped: {float(np.sum(laid[1])) / experts.size:.2%}")
        clock("  gathering rows", it.on_devices(gather_rows, 2), x, laid[0], predicted=2 * row)
        clock("  summing rows", it.on_devices(sum_rows, 2), here[0], laid[0], predicted=1.5 * row)
        for how in ("all_to_all", "puts"):
            sends: dict[str, Any] = {"sent": copies_sent, "predicted": 0.08 + 2 * row + swap_ms}
            run = it.on_devices(lambda x, w, e, how=how: it.hop(how).there(x, w, e)[0], 3)
            clock(f"DISPATCH, {how}", run, x, weights, experts, **sends)
            run = it.on_devices(lambda y, copies, how=how: it.hop(how).back(y, copies), 2)
            clock(f"COMBINE, {how}", run, here[0], laid[0], sent=copies_sent, predicted=1.5 * row + swap_ms)
            around = functools.partial(it.around, how)
            clock(f"both, {how}", it.on_devices(around, 3), x, weights, experts, sent=2 * copies_sent)
            clock(f"both, {how}, forward and backward", it.on_devices(squared(around), 3), x, weights, experts)
    gather = it.on_devices(lambda *given: [jax.lax.all_gather(a, "expert", tiled=True) for a in given], 3)
    every = clock("DISPATCH, gather", gather, x, weights, experts, sent=all_sent, predicted=gather_ms)
    scatter = it.on_devices(lambda y: jax.lax.psum_scatter(y, "expert", tiled=True), 1)
    if every:
        clock("COMBINE, gather", scatter, every[0], sent=all_sent, predicted=gather_ms)
    around = lambda *given: by_gathering(lambda x, w, e: x + 1, given, ("expert",), 0)  # noqa: E731
    clock("both, gather", it.on_devices(around, 3), x, weights, experts, sent=2 * all_sent)
    clock("both, gather, forward and backward", it.on_devices(squared(around), 3), x, weights, experts)
    for tokens in (8, 64, 512):
        few(dataclasses.replace(it, tokens=tokens))
    clock("dense all_to_all by copy engines", swap, buffer, sent=copies_sent, predicted=swap_ms, **BY_COPIES)
    clock("DISPATCH, all_to_all by copy engines", there, x, weights, experts, sent=copies_sent, **BY_COPIES)


def squared(around: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return jax.grad(lambda *given: jnp.sum(around(*given).astype(jnp.float32) ** 2))


def few(it: Exchange) -> None:
    """As in decoding, ten times over: the collectives' latency."""
    given, room = it.drawn(), float(it.ways)

    def ten_times(once: Callable[..., jax.Array]) -> Any:
        def run(x: jax.Array, w: jax.Array, e: jax.Array) -> jax.Array:
            for i in range(10):  # each with choices of its own, or they would be sent once
                x = once(x, w + i, (e + i) % it.experts)
            return x

        return it.on_devices(run, 3)

    local = lambda x, w, e: x + jnp.sum(w * (e >= 0), axis=1, keepdims=True).astype(x.dtype)  # noqa: E731
    gathered = ten_times(lambda *given: by_gathering(local, given, ("expert",), 0))
    options: dict[str, Any] = dict(axes=("expert",), ways=it.ways, own=it.own, dispatch=Dispatch("all_to_all", room))
    copied = ten_times(lambda *given: by_copies(local, given, **options)[0])
    clock(f"{it.tokens} tokens a device, ten times: gather", gathered, *given, predicted=10 * 2 * LATENCY)
    clock(f"{it.tokens} tokens a device, ten times: all_to_all", copied, *given, predicted=10 * (3 * LATENCY + 0.08))


# Whole models


def report(name: str, measured: Measured, wanted: tuple[str, ...], steps: int, longest: int) -> None:
    """Facts of a measurement, and where its time goes: a device's milliseconds a step."""
    say(f"{name}: " + "; ".join(f"{key} {measured.facts[key]}" for key in wanted if key in measured.facts))
    with tempfile.TemporaryDirectory() as folder:
        kernels, span = longest_kernels(measured.call, folder)
    each = 1e3 / jax.device_count() / steps
    nccl = sum(kernel.seconds for kernel in kernels if "nccl" in kernel.name.lower())
    total, calls = sum(kernel.seconds for kernel in kernels), sum(kernel.calls for kernel in kernels)
    say(
        f"  of {1e3 * span / steps:.2f} ms traced: kernels {each * total:.2f}, collectives {each * nccl:.2f} of it, "
        f"{calls / jax.device_count() / steps:.0f} calls"
    )
    for kernel in kernels[:longest]:
        calls = kernel.calls / jax.device_count() / steps
        say(f"  {each * kernel.seconds:9.3f} ms ×{calls:<5.1f} {kernel.name[:80]}")


def decode(small: bool, rows: Sequence[int] = (64, 128, 256, 512)) -> None:
    recipe = load_recipe("bench/v2_lite", PretrainConfig)
    if small:
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, num_hidden_layers=3, **TINY))
    recipe = dataclasses.replace(recipe, mesh=MeshConfig(expert=jax.device_count()))
    for batch in (16,) if small else rows:
        decoded(f"V2-Lite, {batch} rows", dataclasses.replace(recipe, batch_size=batch), small, 6 if batch == 64 else 0)


def decoded(name: str, recipe: PretrainConfig, small: bool, longest: int) -> None:
    def work() -> None:
        measured = measure_decoding(recipe, *((32, 4, 1) if small else (512, 64, 3)))
        wanted = "tokens a second", "time", "weights and cache", "peak memory", "compile time", "routing"
        report(f"{name}, {jax.device_count()} devices", measured, wanted, TRACED, longest)

    tried(name, work)


def v3(small: bool, layers: int) -> PretrainConfig:
    recipe = load_recipe("bench/v3", PretrainConfig)
    model: dict[str, Any] = dict(TINY, n_routed_experts=32, kv_lora_rank=32) if small else {}
    model["num_hidden_layers"] = layers
    return dataclasses.replace(
        recipe,
        mesh=MeshConfig(fsdp=jax.device_count()),
        model=dataclasses.replace(recipe.model, **model),
        data=dataclasses.replace(recipe.data, seq_len=64 if small else recipe.data.seq_len),
        batch_size=jax.device_count(),
    )


def v3_decode(small: bool) -> None:
    layers = 3 if small else 2 * jax.device_count()  # 50 GB a device
    recipe = dataclasses.replace(v3(small, layers), batch_size=16 if small else 256)
    decoded(f"V3, {layers} layers, {recipe.batch_size} rows", recipe, small, 16)


def v3_train(small: bool) -> None:
    layers = 1 + max(1, jax.device_count() // 4)

    def work() -> None:
        measured = measure_training(v3(small, layers), repeats=2 if small else 5)
        wanted = "tokens a second", "time", "model's arithmetic", "peak memory", "until compiled", "loss", "routing"
        report(f"V3, {layers} layers, train, {jax.device_count()} devices", measured, wanted, 1, 20)

    tried("V3, train", work)


# Context


def context(small: bool) -> None:
    size, ways = 256 if small else 32_768, jax.device_count()
    config = load_recipe("models/deepseek_v2_lite", ModelConfig)
    config = dataclasses.replace(config, num_attention_heads=2) if small else config
    compute = ComputeConfig(dtype="bfloat16").on(make_mesh(devices=jax.devices()[:1]))
    graph, state = nnx.split(MLA(config, compute, rngs=nnx.Rngs(0)))
    state = jax.tree.map(lambda w: w.astype(jnp.bfloat16), state)
    x = jax.random.normal(jax.random.key(0), (1, size, config.hidden_size), jnp.bfloat16)
    ids = jnp.sort(jax.random.randint(jax.random.key(1), (1, size), 1, 6))

    def layer(packed: bool, balanced: bool, backward: bool) -> Any:
        def value(state: Any, x: jax.Array, ids: jax.Array) -> Any:
            visible = Visible.rows(ids if packed else None)
            rope = rotary_tables(config, jnp.arange(size)[None])
            order = RowOrder.of(compute.rules, visible, (1, size)) if balanced else RowOrder(compute.rules)
            y, _ = nnx.merge(graph, state)(order.spread(x), jax.tree.map(order.spread, rope), order.seen(visible))
            y = order.back(y).astype(jnp.float32)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True) if backward else value)

    def error(a: Any, b: Any) -> float:
        a, b = np.float32(a), np.float32(b)
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    for packed in (False, True):
        right: Any = None
        for devices, balanced in ((1, True), (ways, True), (ways, False)):
            mesh = make_mesh(MeshConfig(context=devices), jax.devices()[:devices])
            name = f"{'five documents' if packed else 'one document'}, {devices} devices, "
            name += "one" if devices == 1 else "balanced" if balanced else "in order"
            with jax.set_mesh(mesh):
                split = jax.NamedSharding(mesh, jax.P(None, "context"))
                operands = jax.device_put(state, jax.NamedSharding(mesh, jax.P())), *jax.device_put((x, ids), split)
                clock(f"forward: {name}", layer(packed, balanced, False), *operands)
                found = clock(f"forward and backward: {name}", layer(packed, balanced, True), *operands)
            found = jax.device_get(found)
            right = found if right is None else right
            if found is not None and devices > 1:
                say(f"  differs by {max(jax.tree.leaves(jax.tree.map(error, found, right))):.1e}")


PARTS: dict[str, Callable[..., None]] = {
    "dispatch": dispatch,
    "decode": decode,
    "v3-decode": v3_decode,
    "v3-train": v3_train,
    "context": context,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rows", type=int, nargs="*", help="decode: batches")
    given = parser.parse_args()
    PARTS[given.part](given.small, **({"rows": given.rows} if given.rows else {}))
    devices = f"{jax.devices()[0].device_kind} × {jax.device_count()}, jax {jax.__version__}"
    print("\n".join([f"\n{given.part}: {devices}, {time.monotonic() - BEGAN:.0f} s", *TABLE]), flush=True)


if __name__ == "__main__":
    main()
