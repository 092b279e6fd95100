"""What ``scripts/bench_mesh.sh`` runs of training, and the table at the end.

Rows share a process, which compiles all of them side by side first and then runs one after another, on as many of the
host's devices as each is of. What fails there is told in its row; where the process itself ends or stands still, the
rest is given to a new one, which finds the programs in the compilation cache.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import gc
import itertools
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TRAINING = "train", "equal", "whole", "flags"
OTHERS = "dispatch", "decode", "v3-decode", "v3-train", "context"
RECIPE = "bench/v2_lite_8_layers"
TRACED = 3  # steps
PATIENCE = 170  # seconds without a word

# Of 80 GB: eight layers, with Adam's moments in bfloat16, as V3 has them; float32 ones need 88 GiB.
SMALL = dict(num_hidden_layers=2, n_routed_experts=16, hidden_size=32, moe_intermediate_size=16, vocab_size=256)
SMALL |= dict(intermediate_size=32, num_attention_heads=2, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=16)
STEP = "--optimizer.moments-dtype", "bfloat16"
# Whole experts over fsdp, which join without a copy; or tokens go to a group of expert × fsdp devices, and no expert is
# gathered.
WHOLE = (
    "--compute.rules.experts",
    "expert",
    "fsdp",
    "--compute.rules.experts-gathered",
    "fsdp",
    "--compute.rules.expert-embed",
)
SPREAD = (
    "--compute.rules.experts",
    "expert",
    "fsdp",
    "--compute.rules.experts-gathered",
    "--compute.rules.expert-embed",
)
CAPACITY = "--compute.dispatch", "all_to_all", "--compute.dispatch-capacity", "1.25"
PUTS = "--compute.dispatch", "puts", *CAPACITY[2:]
LHS, OVERLAP = "xla_gpu_enable_latency_hiding_scheduler", "xla_gpu_experimental_parallel_collective_overlap_limit"


@dataclasses.dataclass(frozen=True)
class Row:
    part: str
    name: str
    devices: int
    overrides: tuple[str, ...] = ()
    rows: int = 4
    """Of a device."""
    xla: dict[str, Any] = dataclasses.field(default_factory=dict)
    exact: bool = False
    """Products in float32 without shortcuts."""
    traced: bool = True


def axes(count: int) -> list[tuple[str, tuple[str, ...]]]:
    """Meshes of so many devices."""
    n, half = str(count), str(count // 2)
    found: list[tuple[str, tuple[str, ...]]] = [
        (f"data {n}", ("--mesh.data", n)),
        (f"fsdp {n}", ("--mesh.fsdp", n)),
        (f"expert {n}, gather", ("--mesh.expert", n)),
        (f"expert {n}, all_to_all", ("--mesh.expert", n, *CAPACITY)),
    ]
    both = "--mesh.fsdp", "2", "--mesh.expert", half
    return found + ([(f"fsdp 2 × expert {half}, gather", both)] if count > 2 else [])


def rows_of(part: str, cards: int) -> Iterator[Row]:
    counts = [count for count in (2, 4, 8) if count <= cards]
    n, half = str(cards), str(max(1, cards // 2))
    if part == "train":
        yield Row(part, "one device", 1, STEP)
        for count in sorted(counts, reverse=True):
            yield from (Row(part, name, count, (*STEP, *more)) for name, more in axes(count))
        yield Row(part, f"fsdp {n}, whole experts", cards, (*STEP, "--mesh.fsdp", n, *WHOLE))
        yield Row(part, f"expert {n}, puts", cards, (*STEP, "--mesh.expert", n, *PUTS))
    elif part == "equal":
        kinds = ("bfloat16", "4", "1024"), ("float32", "2", "256")
        for dtype, layers, columns in kinds:
            of = "--model.num-hidden-layers", layers, "--data.seq-len", columns, "--compute.dtype", dtype
            same: dict[str, Any] = {"exact": dtype == "float32", "traced": False}
            yield Row(part, f"{dtype}: one device", 1, of, cards, **same)
            yield Row(part, f"{dtype}: one device, 2 microbatches", 1, (*of, "--step.microbatches", "2"), cards, **same)
            for name, more in axes(cards):  # room for every copy: nothing is dropped
                more = tuple(n if word == "1.25" else word for word in more)
                yield Row(part, f"{dtype}: {name}", cards, (*of, *more), 1, **same)
    elif part == "whole":
        deep = "--model.num-hidden-layers", "27", "--compute.remat", "kernels", "--compute.scan-unroll", "1"
        # Of four, state and gradients alone take 60 of 80 GB with float32 moments.
        deep = (*deep, "--loss.chunk", "1024", *(STEP if cards < 8 else ()))
        for name, more in (("gather", ()), (f"all_to_all, experts in {n}", (*SPREAD, *CAPACITY))):
            mesh = "--mesh.fsdp", "2", "--mesh.expert", half
            yield Row(part, f"whole, fsdp 2 × expert {half}, {name}", cards, (*deep, *mesh, *more))
        # A layer's experts are gathered once for all rows of a device; four cards of 80 GB have no room for eight.
        for rows, expert in ((4, 1), (8, 1), (8, 2)):
            mesh = "--mesh.fsdp", str(cards // expert), "--mesh.expert", str(expert)
            name = f"whole, fsdp {cards // expert} × expert {expert}, whole experts, {rows} rows"
            yield Row(part, name, cards, (*deep, *mesh, *WHOLE), rows)
    elif part == "flags":
        meshes = ("data", ("--mesh.data", n)), ("fsdp", ("--mesh.fsdp", n)), ("expert", ("--mesh.expert", n))
        for name, more in meshes:
            variants: dict[str, dict[str, Any]] = {
                "no latency hiding": {LHS: False},
                "two collectives at once": {OVERLAP: 2},
                "combined up to 1 GB": {
                    f"xla_gpu_{kind}_combine_threshold_bytes": 1 << 30
                    for kind in ("all_gather", "all_reduce", "reduce_scatter")
                },
            }
            for variant, xla in variants.items():
                yield Row(part, f"{name} {n}, {variant}", cards, (*STEP, *more), xla=xla)


# What the process of the rows does.


def work(rows: list[Row], small: bool) -> None:
    """Compile all, run each; a line of JSON for each thing that is done."""
    import jax
    import tyro

    from deepseek_jax.cli.bench_training import lowered_step
    from deepseek_jax.parallel.mesh import make_mesh
    from deepseek_jax.workflows.pretrain import PretrainConfig
    from deepseek_jax.workflows.recipe import load_recipe

    tiny = (
        "--compute.scan-unroll",
        "1",
        "--compute.dtype",
        "float32",
        "--data.seq-len",
        "32",
        "--model.v-head-dim",
        "16",
    )
    smaller = [
        *tiny,
        *(word for name, size in SMALL.items() for word in (f"--model.{name.replace('_', '-')}", str(size))),
    ]

    def lowered(row: Row) -> tuple[Any, Any, Any]:
        default = load_recipe(RECIPE, PretrainConfig)
        batch = ("--batch-size", str(row.rows * row.devices))
        args = [*row.overrides, *batch, *(smaller if small else ())]
        recipe = tyro.cli(PretrainConfig, default=default, args=args)
        mesh = make_mesh(recipe.mesh, jax.devices()[: row.devices])
        precision = jax.default_matmul_precision("highest" if row.exact else None)
        with precision:
            return recipe, mesh, lowered_step(recipe, mesh)

    def attempt(row: Row, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Exception as error:
            say(done=row.name, failed=f"{type(error).__name__}: {error}"[:1500])

    pool, began = concurrent.futures.ThreadPoolExecutor(8), time.monotonic()

    def program(row: Row) -> tuple[Any, Any, Any]:
        recipe, mesh, step = lowered(row)
        say(doing=f"lowered {row.name}, {time.monotonic() - began:.0f} s")
        options = row.xla if mesh.devices.flat[0].platform == "gpu" else {}
        return recipe, mesh, pool.submit(step.compile, compiler_options=options or None)

    for _, some in itertools.groupby(rows, functools.partial(turn, cards=max(row.devices for row in rows))):
        programs = [(row, attempt(row, functools.partial(program, row))) for row in some]
        concurrent.futures.wait([its[2] for _, its in programs if its])
        say(doing=f"compiled {len(programs)} programs, {time.monotonic() - began:.0f} s")
        while programs:
            row, its = programs.pop(0)
            if its:
                say(begun=row.name)
                attempt(
                    row, lambda row=row, its=its: say(done=row.name, found=run(row, its[0], its[1], its[2].result()))
                )
            del its
            gc.collect()


def turn(row: Row, cards: int) -> int:
    """Rows of one turn are compiled together; if the time is short, the last turns are left out."""
    if row.part == "train":
        return 0 if row.devices in (1, cards) else 2
    return {"whole": 0, "equal": 1, "flags": 3}[row.part]


def run(row: Row, recipe: Any, mesh: Any, compiled: Any) -> dict[str, Any]:
    import jax

    from deepseek_jax.cli.bench_report import PEAKS, peak_memory
    from deepseek_jax.cli.bench_training import dropped_share, run_steps, training_flops
    from deepseek_jax.cli.device_trace import communication, traced
    from deepseek_jax.cli.longest_kernels import kernels_of

    began = time.monotonic()
    steps = run_steps(recipe, mesh, compiled, repeats=8 if row.part == "equal" else 10)
    last, tokens = steps.every[-1], recipe.batch_size * recipe.data.seq_len
    peak = PEAKS.get(jax.devices()[0].device_kind.removesuffix(" 80GB HBM3"), 989e12)
    found = {
        "tokens": tokens / steps.seconds,
        "seconds": steps.seconds,
        "memory": peak_memory(compiled),
        "mfu": tokens * training_flops(recipe) / steps.seconds / mesh.size / peak,
        "losses": steps.losses,
        "loads": [metrics["load"].tolist() for metrics in steps.every],
        "max_vio": [float(metrics["max_vio"]) for metrics in steps.every],
        "dropped": dropped_share(recipe, last) if "dropped" in last else 0.0,
    }
    if row.traced:
        folder = os.environ.get("TRACES") or tempfile.mkdtemp()

        def call() -> Any:
            return [steps.call() for _ in range(TRACED)]

        devices = traced(call, folder)
        if part := communication(devices, TRACED):
            found |= {f"{name}_ms": 1e3 * value for name, value in part._asdict().items()}
            kernels = kernels_of(devices)[0][:24]
            scale = 1e3 / TRACED / len(devices)
            found["kernels"] = [(one.name[:60], one.seconds * scale, one.calls) for one in kernels]
    return found | {"in_all": time.monotonic() - began}


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


# What stands around it.


def gathered(rows: list[Row], arguments: list[str], until: float) -> dict[str, dict[str, Any]]:
    """What was found of each row, by processes until none is left or the time is over."""
    results: dict[str, dict[str, Any]] = {}
    while left := [row for row in rows if row.name not in results]:
        names = json.dumps([row.name for row in left])
        command = [sys.executable, __file__, *arguments, "--rows", names]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            current, reason = followed(process, results, until)
        if all(row.name in results for row in rows) or time.monotonic() > until:
            break
        current = current or left[0].name  # none was begun: that of the first is taken for it
        results[current] = {"failed": reason}
    for row in rows:
        results.setdefault(row.name, {"failed": "not run: out of time"})
    return results


def followed(process: subprocess.Popen[str], results: dict[str, Any], until: float) -> tuple[str, str]:
    """Read what it says -> (the row that it was in, why it ended)."""
    lines: queue.Queue[str | None] = queue.Queue()
    assert process.stdout

    def read() -> None:
        assert process.stdout
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    began, current = time.monotonic(), ""
    while True:
        try:
            line = lines.get(timeout=max(0.1, min(PATIENCE, until - time.monotonic())))
        except queue.Empty:
            process.kill()
            return current, f"stood still for {PATIENCE} s" if time.monotonic() < until else "not run: out of time"
        if line is None:
            return current, f"its process ended with {process.wait()}"
        if not line.startswith("{"):
            print(line, end="", flush=True)
            continue
        said = json.loads(line)
        current = said.get("begun", current)
        if "done" in said:
            results[said["done"]] = said.get("found", {"failed": said.get("failed")})
            current = ""
        shown = said.get("doing") or (said["done"] + ": " + told(results[said["done"]]) if "done" in said else "")
        if shown:
            print(f"[{time.monotonic() - began:5.0f} s] {shown}", flush=True)


def told(found: dict[str, Any]) -> str:
    if "failed" in found:
        return f"FAILED {found['failed']}"
    text = f"{found['tokens']:10,.0f} tok/s {1e3 * found['seconds']:8.2f} ms, {found['memory']}, MFU {found['mfu']:.1%}"
    if "exposed_ms" in found:
        text += f"; collectives {found['collectives_ms']:.1f} ms, exposed {found['exposed_ms']:.1f}"
        text += f", idle {found['idle_ms']:.1f}"
    vio = found["max_vio"]
    return text + f"; MaxVio {vio[2]:.2f}…{vio[-1]:.2f}, dropped {found['dropped']:.2%}; {found['in_all']:.0f} s"


def table(rows: list[Row], results: dict[str, dict[str, Any]]) -> list[str]:
    one = next((results[row.name].get("tokens") for row in rows if row.name == "one device"), None)
    lines = []
    for row in sorted(rows, key=lambda row: (TRAINING.index(row.part), row.part == "train" and row.devices)):
        found = results[row.name]
        line = f"{row.part:6s} {row.name:44s} "
        if "failed" not in found and row.part == "equal":
            line += compared(found, results[row.name.split(":")[0] + ": one device"])
        else:
            ratio = found.get("tokens", 0) / one if one and row.part in ("train", "flags") else 0
            line += (f"{ratio:5.2f} ×, {ratio / row.devices:6.1%} " if ratio else "") + told(found)
        lines.append(line)
    return lines


def compared(found: dict[str, Any], one: dict[str, Any]) -> str:
    """The largest difference of ten steps' losses, and of choices of experts those that changed, at most of a step."""
    if "failed" in one:
        return "nothing to compare with"
    losses = zip(found["losses"], one["losses"], strict=True)
    most = max(abs(a - b) / abs(b) for a, b in losses)
    flat = lambda loads: [load for layer in loads for load in layer]  # noqa: E731
    moved = max(
        sum(abs(a - b) for a, b in zip(flat(mine), flat(its), strict=True)) / 2 / len(its)
        for mine, its in zip(found["loads"], one["loads"], strict=True)
    )
    return (
        f"losses {found['losses'][0]:.6f}…{found['losses'][-1]:.6f}, off by {most:.1e} of one device's; "
        f"{moved:.1e} of the choices elsewhere; dropped {found['dropped']:.2%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join((*TRAINING, *OTHERS))}")
    parser.add_argument("--seconds", type=float, default=560, help="in which the table is to be there")
    parser.add_argument("--cards", type=int, default=0, help="at most; 0: all that are here")
    parser.add_argument("--only", default="", help="rows of training in whose names this regular expression is found")
    parser.add_argument("--small", action="store_true", help="tiny networks, for CPUs")
    parser.add_argument("--rows", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    began = time.monotonic()
    parts = options.parts or [*TRAINING[:3], *OTHERS]
    if unknown := set(parts) - {*TRAINING, *OTHERS}:
        parser.error(f"parts={', '.join(sorted(unknown))}: expected some of {', '.join((*TRAINING, *OTHERS))}")
    cards = options.cards or count_devices()
    rows = [row for part in parts for row in rows_of(part, cards) if re.search(options.only, row.name)]
    rows = [row for row in rows if not (options.small and "puts" in row.overrides)]  # which Hopper alone has
    rows.sort(key=functools.partial(turn, cards=cards))
    if options.rows:
        wanted = json.loads(options.rows)
        return work([row for row in rows if row.name in wanted], options.small)
    arguments = [*parts, "--cards", str(cards), *(["--small"] if options.small else [])]
    others = [part for part in parts if part in OTHERS]
    share = 0.6 if others else 1.0  # of the time, for training
    results = gathered(rows, arguments, began + share * options.seconds) if rows else {}
    script = str(Path(__file__).with_name("bench_mesh_parts.py"))
    for part in others:
        left = options.seconds - (time.monotonic() - began)
        with contextlib.suppress(subprocess.TimeoutExpired):  # what it had printed stands
            command = [sys.executable, script, part, *(["--small"] if options.small else [])]
            subprocess.run(command, timeout=max(30.0, left), check=False)
    print(f"\n{cards} devices, {time.monotonic() - began:.0f} s", *table(rows, results), sep="\n", flush=True)
    if out := os.environ.get("OUT"):
        Path(out).mkdir(parents=True, exist_ok=True)
        Path(out, f"mesh_{'_'.join(parts)}.json").write_text(json.dumps(results))


def count_devices() -> int:
    """In a process of its own, which leaves the devices alone."""
    done = subprocess.run(
        [sys.executable, "-c", "import jax; print(jax.device_count())"], capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1])


if __name__ == "__main__":
    main()
