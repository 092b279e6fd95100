"""Compile the TPU kernels for chips that are not here: ``python -m deepseek_kernels.compile_tpu [CASE …]``.

Prints for each chip and case the compiler's seconds and the bytes beside arguments and results. Needs no TPU, but
libtpu: ``--install`` puts the one that jax pins into a folder beside the environment's packages and not among them,
where every command on a CPU would look for a TPU and complain. Each compilation is a process of its own with a time
limit: blocks that do not fit can keep the compiler busy for minutes before it says so.
"""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

from deepseek_kernels import FP8Entries, InStack, Target, Visible, gqa_attention, grouped_matmul, mla_decode
from deepseek_kernels.block_fp8 import FP8

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
FOLDER = Path(sys.prefix) / "libtpu"
_LIMIT = 240  # seconds
_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}
_ENVIRONMENT |= {"JAX_ENABLE_COMPILATION_CACHE": "0"}  # which cannot read again what it wrote of another machine's


def _attention(heads: int, size: int, *, target, keys: int = 0, widths=(192, 128), batch: int = 1, of=0, forward=False):
    """Rows of segments, the gradients by q, k and v; forward alone of whole rows, as prefill has them. of: the size of
    a row whose last ``size`` tokens are the queries, as a device has them where ``context`` splits rows."""

    def run(q, k, v, ids):
        if forward:
            return gqa_attention(q, k, v, Visible(), 0.1, target=target)
        visible = Visible.rows(ids)
        if of:
            visible = replace(visible, q_positions_BS=of - size + jnp.arange(size)[None], q_segments_BS=ids[:, -size:])
        attend = lambda q, k, v: gqa_attention(q, k, v, visible, 0.1, target=target)  # noqa: E731
        out, gradients = jax.vjp(attend, q, k, v)
        return gradients(out)

    array = lambda size, heads, width: ((batch, size, heads, width), jnp.bfloat16)  # noqa: E731
    (K, V), row = widths, of or size
    of_keys = [array(row, keys or heads, width) for width in (K, V)]
    return run, [array(size, heads, K), *of_keys, ((batch, row), jnp.int32)]


def _grouped(experts: int, width: int, hidden: int, rows: int, *, target, forward=False):
    """The gradients by x and, in float32, by w; forward alone as in decoding, with weights in bfloat16."""

    def run(x, w, sizes):
        multiply = lambda x, w: grouped_matmul(x, w, sizes, target=target)  # noqa: E731
        if forward:
            return multiply(x, w)
        y, gradients = jax.vjp(multiply, x, w)
        return gradients(y)

    dtype = jnp.bfloat16 if forward else jnp.float32
    return run, [((rows, width), jnp.bfloat16), ((experts, width, hidden), dtype), ((experts,), jnp.int32)]


def _decode(batch: int, columns: int, heads: int, queries: int = 1, *, target, page: int = 0, fp8: bool = False):
    """One layer of a stack of two, rows of different lengths."""

    def run(q, stack, layer, positions, lengths, *table):
        visible = Visible(q_positions_BS=positions, lengths_B=lengths, pages_BJ=table[0] if page else None)
        kept = FP8Entries(*stack) if fp8 else stack[0]
        return mla_decode(q, InStack(kept, layer), visible, 0.1, values=512, target=target)

    rows, size = (batch * columns // page, page) if page else (batch, columns)
    of = lambda dtype, *shape: ((2, rows, *shape), dtype)  # noqa: E731
    stack = [of(jnp.bfloat16, size, 576)]
    if fp8:
        stack = [of(FP8, size, 512), of(jnp.bfloat16, 4, size), of(jnp.bfloat16, size, 64)]
    arrays = [((batch, queries, heads, 576), jnp.bfloat16), stack, ((), jnp.int32)]
    table = [((batch, columns // page), jnp.int32)] if page else []
    return run, [*arrays, ((batch, queries), jnp.int32), ((batch,), jnp.int32), *table]


# Of a target: a program, and its arguments' shapes and dtypes, or lists of such.
CASES: dict[str, Callable[..., tuple[Callable[..., Any], list[Any]]]] = {
    "attention, 16 heads, 4096": partial(_attention, 16, 4096),
    "attention, 128 heads, 4096": partial(_attention, 128, 4096),
    "attention, 16 heads, 32768": partial(_attention, 16, 32768),
    "attention, 16 heads, 131072": partial(_attention, 16, 131072),
    "attention, 16 heads, 2 x 5000": partial(_attention, 16, 5000, batch=2),
    "attention, 16 heads, 8192 of 32768": partial(_attention, 16, 8192, of=32768),
    "prefill, 128 heads, 4096": partial(_attention, 128, 4096, forward=True),
    "grouped heads, 28 of 4, 4096": partial(_attention, 28, 4096, keys=4, widths=(128, 128)),
    "grouped heads, 14 of 2, 64 wide": partial(_attention, 14, 4096, keys=2, widths=(64, 64)),
    "experts V2-Lite, wi": partial(_grouped, 64, 2048, 2816, 6 * 8192),
    "experts V2-Lite, wo": partial(_grouped, 64, 1408, 2048, 6 * 8192),
    "experts V2-Lite, halved": partial(_grouped, 64, 2048, 704, 6 * 8192),
    "experts V3, 8 of 256, wi": partial(_grouped, 8, 7168, 4096, 8192),
    "experts V3, 8 of 256, wo": partial(_grouped, 8, 2048, 7168, 8192),
    "experts V3, 256, wi, few rows": partial(_grouped, 256, 7168, 4096, 512, forward=True),
    "experts, 384, few rows": partial(_grouped, 384, 2048, 2048, 512, forward=True),
    "experts, 1": partial(_grouped, 1, 2048, 2816, 1000),
    "decode, 64 x 4096, 16 heads": partial(_decode, 64, 4096, 16),
    "decode, 64 x 4096, 128 heads": partial(_decode, 64, 4096, 128),
    "decode, 8 x 32768, 128 heads, 4 queries": partial(_decode, 8, 32768, 128, 4),
    "decode, 1 x 131072, 16 heads": partial(_decode, 1, 131072, 16),
    "decode, 64 x 1000, 16 heads": partial(_decode, 64, 1000, 16),
    "decode, 64 x 4096, 16 heads, pages of 64": partial(_decode, 64, 4096, 16, page=64),
    "decode, 8 x 32768, 128 heads, 4 queries, pages of 256": partial(_decode, 8, 32768, 128, 4, page=256),
    "decode, 64 x 4096, 16 heads, FP8": partial(_decode, 64, 4096, 16, fp8=True),
    "decode, 64 x 32768, 16 heads, FP8, pages of 64": partial(_decode, 64, 32768, 16, page=64, fp8=True),
    "decode, 8 x 32768, 128 heads, 4 queries, FP8, pages of 64": partial(_decode, 8, 32768, 128, 4, page=64, fp8=True),
    "decode, 64 x 4096, 128 heads, FP8, pages of 256": partial(_decode, 64, 4096, 128, page=256, fp8=True),
}


def compiled(chip: str, case: str) -> dict[str, float]:
    """Seconds of the compiler, bytes of temporaries, FLOPs (of a loop's body once, of splash attention none)."""
    device = topologies.get_topology_desc(TOPOLOGIES[chip], "tpu").devices[0]
    run, shapes = CASES[case](target=Target.of(device))
    place = SingleDeviceSharding(device)

    # Arguments lie as a program's own arrays do that a kernel reads, not as XLA would have them come.
    def operand(shape, dtype):
        format = Format(Layout(tuple(range(len(shape)))), place) if shape else place
        return jax.ShapeDtypeStruct(shape, dtype, sharding=format)

    operands = [[operand(*one) for one in each] if isinstance(each, list) else operand(*each) for each in shapes]
    lowered = jax.jit(run).lower(*operands)
    start = time.perf_counter()
    program = lowered.compile()
    seconds = time.perf_counter() - start
    cost, memory = program.cost_analysis(), program.memory_analysis()
    assert cost and memory, case
    return {"seconds": seconds, "temporaries": memory.temp_size_in_bytes, "flops": cost["flops"]}


def available() -> bool:
    return FOLDER.exists() or bool(importlib.util.find_spec("libtpu"))


def install() -> None:
    """libtpu, as the ``tpu`` extra of this jax has it, into ``FOLDER``, unless the environment has it itself."""
    if importlib.util.find_spec("libtpu"):
        return
    pinned = next(line for line in importlib.metadata.requires("jax") or () if line.startswith("libtpu"))
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-deps", "--no-compile"]
    subprocess.run([*pip, "--upgrade", "--target", str(FOLDER), pinned.split(";")[0]], check=True)


def apart(chip: str, *cases: str, limit: float = _LIMIT) -> list[dict[str, Any]]:
    """``compiled`` of each case, in one process apart. RuntimeError where that fails or takes ``limit`` seconds."""
    command = [sys.executable, "-m", "deepseek_kernels.compile_tpu", "--these", chip, *cases]
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(FOLDER), os.environ.get("PYTHONPATH", "")])
    own = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"PYTHONPATH": path}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=own | _ENVIRONMENT)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not compiled in {limit:.0f} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(next((line for line in reversed(lines) if "rror: " in line), lines[-1] if lines else ""))
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main(arguments: list[str]) -> None:
    if arguments == ["--install"]:
        return install()
    if arguments[:1] == ["--these"]:
        for case in arguments[2:]:
            print(json.dumps(compiled(arguments[1], case)))
        return
    print("| case | chip | compiled in | temporaries |\n|---|---|---|---|")
    for case in [case for case in CASES if not arguments or any(part in case for part in arguments)]:
        for chip in TOPOLOGIES:
            try:
                (found,) = apart(chip, case)
                told = f"{found['seconds']:.1f} s | {found['temporaries'] / 2**20:,.0f} MiB"
            except RuntimeError as error:
                told = f"{error} | "
            print(f"| {case} | {chip} | {told} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
