"""A recipe's program compiled for a machine that is not there: its memory, its traffic, and how long it would take."""

import dataclasses
import math
import re
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from deepseek_jax.model.costs import attention_flops, forward_flops
from deepseek_jax.parallel.exchange import check_exchange
from deepseek_jax.parallel.hlo import Module, shape_bytes
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.roofline import Estimate, estimate, short
from deepseek_jax.parallel.topology import OPTIONS, Links, Topology
from deepseek_jax.saying import doing
from deepseek_jax.workflows.abstract import Work, abstract
from deepseek_jax.workflows.pretrain import PretrainConfig
from deepseek_jax.workflows.scheduled import scheduled
from deepseek_kernels import tpu

Until = Literal["compiled", "scheduled"]
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Found:
    """Of one device, in bytes, seconds and FLOPs, but for what says otherwise."""

    topology: str
    devices: int
    mesh: dict[str, int]
    work: str
    tokens: int
    """Of all devices, in one run of the program."""
    memory: dict[str, int]
    """By category; ``total`` is the compiler's peak, of which the rest is, or what it refused."""
    available: int
    fits: bool
    refusal: str = ""
    largest: tuple[tuple[int, str], ...] = ()
    """The largest arrays among the temporaries, and where they come from."""
    parameters: int = 0
    """Of the model, on all devices, where it is trained."""
    state_bytes: float = 0.0
    """Of each of them, with its moments."""
    model_flops: float = 0.0
    """Of a device's tokens: three times the forward pass, or one; none done again. MTP is left out."""
    estimate: Estimate | None = None
    compile_seconds: float = 0.0
    until: str = "compiled"
    text: str = dataclasses.field(default="", repr=False)

    @property
    def mfu(self) -> float | None:
        """Share of the peak in bfloat16."""
        chip = Topology.parse(self.topology).chip
        return None if self.estimate is None else self.model_flops / self.estimate.seconds / chip.flops


def compile_for(
    recipe: PretrainConfig, topology: Topology, work: Work = "train", columns: int = 0, until: Until = "compiled"
) -> Found:
    """Compile the recipe's train step, or what serving does up to each answer's first token or for one more of each,
    for ``topology``. Nothing of that machine need be here, and no array is made.

    columns: tokens of a row, instead of the recipe's ``data.seq_len``; in decoding those before the new one.
    until: stop where a TPU's compiler has the program's schedule and memory, of which all figures are.

    Raises ValueError where the recipe's layout is not legal, and what ``Topology.devices`` does.
    """
    if until == "scheduled" and topology.platform != "tpu":
        raise ValueError(f"until=scheduled with topology={topology}: a TPU's compiler alone is stopped there")
    columns = columns or recipe.data.seq_len
    mesh = make_mesh(recipe.mesh, topology.devices())
    tokens = recipe.batch_size * (1 if work == "decode" else columns)
    facts: dict[str, Any] = {"topology": str(topology), "devices": mesh.size, "mesh": dict(mesh.shape), "work": work}
    facts |= {
        "tokens": tokens,
        "available": int(_room(topology)),
        "model_flops": _model_flops(recipe, work, columns, mesh),
        "until": until,
    }
    with doing(f"tracing for {topology}"), jax.set_mesh(mesh):
        shapes = abstract(recipe, mesh, work, columns)
        memory = dict(shapes.memory)
        facts |= {"parameters": shapes.parameters, "state_bytes": shapes.state_bytes}
        if work == "train" and (least := _too_much(memory, recipe.compute.dtype, facts["available"])):
            return Found(**facts, memory=least, fits=False, refusal="its shapes alone do not fit, so not compiled")
        lowered = shapes.lower() if until == "compiled" else None
    began = time.perf_counter()
    try:
        with doing(f"compiling for {topology}"):
            if lowered is None:
                text, total = scheduled(recipe, topology, work, columns)
            else:
                compiled = lowered.compile(compiler_options=OPTIONS[topology.platform] or None)
                text, total = compiled.as_text(), _peak(compiled, topology.platform)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        seconds = time.perf_counter() - began
        return Found(**facts | _refused(str(error), memory), fits=False, compile_seconds=seconds)
    facts["compile_seconds"] = time.perf_counter() - began
    assert text
    if topology.platform == "tpu":  # it was taken, so it fits; what is said to live at once is a little above that
        total = min(total, facts["available"])
    rest = total - sum(memory.values())
    if "gradients" in memory:  # as many as there is room for, where they are never there all at once
        memory["gradients"] = max(0, memory["gradients"] + min(0, rest))
    memory["activations, temporaries"] = max(0, total - sum(memory.values()))
    memory["total"] = total
    of_kernels = _kernel_flops(recipe, work, columns, mesh), _turns, _grouped_rows(recipe, work, columns, mesh)
    found = estimate(text, Links(topology, mesh), *of_kernels)
    largest = () if work == "decode" else _largest(text)
    fits = total <= facts["available"]
    return Found(**facts, memory=memory, fits=fits, largest=largest, estimate=found, text=text)


def _too_much(memory: dict[str, int], dtype: str, room: int) -> dict[str, int]:
    """What no compiler brings below ``room``, or nothing: the state, and gradients in ``dtype``, which are all there
    before the first of them is used, since their norm is taken."""
    least = memory | {"gradients": memory["gradients"] * jnp.dtype(dtype).itemsize // 4}
    total = sum(least.values())
    return least | {"total": total} if total > room else {}


def _room(topology: Topology) -> float:
    """XLA keeps 0.26 GiB of a v5p's memory for itself; jax takes 95 % of a GPU's at most."""
    return topology.chip.hbm * (0.95 if topology.platform == "cuda" else 1.0)


def _peak(compiled: Any, platform: str) -> int:
    """Of a GPU's program all that is allocated. Of a TPU's what lives at once: its temporaries are said to be more than
    the compiler asks for when it refuses (docs/compile.md), and it refuses whatever does not fit."""
    sizes = compiled.memory_analysis()
    code = sizes.generated_code_size_in_bytes
    if platform == "tpu":  # arguments, results in other places, and temporaries at their peak
        return int(sizes.peak_memory_in_bytes + code)
    arguments = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return int(arguments + sizes.temp_size_in_bytes + code)


def _refused(message: str, memory: dict[str, int]) -> dict[str, Any]:
    """What the compiler says it would need in all, which it calls temporaries though arguments are among them, and what
    of the memory is left to a program."""
    number = r"([\d.]+)([KMGT])"
    amount = lambda value, unit: int(float(value) * _UNITS[unit])  # noqa: E731
    total = known = sum(memory.values())
    whole = rf"Used {number} of {number} hbm", rf"\({number}\) exceeds available HBM \({number}\)"
    room = {}
    if told := next(filter(None, (re.search(pattern, message) for pattern in whole)), None):
        total, room = amount(told[1], told[2]), {"available": amount(told[3], told[4])}
    sizes = re.findall(rf"Size: {number}.*?(?:op_name=\"([^\"]*)\"|Shape: (\S+))", message, re.DOTALL)
    largest = tuple((amount(value, unit), short(scope) or shape) for value, unit, scope, shape in sizes[:8])
    memory = memory | {"activations, temporaries": max(0, total - known), "total": total}
    return room | {"memory": memory, "refusal": " ".join(message.split())[:240], "largest": largest}


def _largest(text: str, count: int = 8) -> tuple[tuple[int, str], ...]:
    """Results of single instructions, none twice from one place in the program."""
    module = Module(text)
    times, fused = module.times(), set()
    for instructions in module.computations.values():
        for one in instructions.values():
            fused |= set(one.called) if one.opcode in ("fusion", "reduce", "sort", "scatter", "all-reduce") else set()
    found: dict[str, int] = {}
    for name, instructions in module.computations.items():
        for one in instructions.values() if times[name] and name not in fused else ():
            if one.opcode in ("fusion", "custom-call", "convolution", "dot", "all-gather", "all-to-all", "broadcast"):
                scope = short(one.scope)
                if scope and not scope.startswith("optimizer"):
                    found[scope] = max(found.get(scope, 0), shape_bytes(one.shape))
    return tuple(sorted(((size, scope) for scope, size in found.items()), reverse=True)[:count])


def _model_flops(recipe: PretrainConfig, work: Work, columns: int, mesh: Mesh) -> float:
    model = recipe.model
    if work == "decode":
        each, tokens = forward_flops(model) + attention_flops(model, columns, absorbed=True), recipe.batch_size
    else:
        each, tokens = forward_flops(model) + attention_flops(model, columns // 2), recipe.batch_size * columns
        if work == "prefill":  # the head is applied to a row's last token alone
            each -= 2 * model.vocab_size * model.hidden_size * (1 - 1 / columns)
    return (3 if work == "train" else 1) * each * tokens / mesh.size


def _kernel_flops(recipe: PretrainConfig, work: Work, columns: int, mesh: Mesh):
    """Of attention's kernels, whose FLOPs no compiler counts: those of one layer, causal, and in the backward pass as
    much more as it has products."""
    model = recipe.model
    layer = _attention_of_layer(recipe, work, columns) / mesh.size
    if model.attention == "gqa":
        key = value = model.head_dim
    else:
        key, value = model.qk_nope_head_dim + model.qk_rope_head_dim, model.v_head_dim
    products = {"queries": 2 * key + value, "dq": 2 * key + value, "keys": 2 * (key + value), "dkv": 2 * (key + value)}

    def flops(scope: str) -> float | None:
        if "/attend" not in scope:
            return None
        kernel = scope.split("/attend", 1)[1]
        return (
            layer * next((number for name, number in products.items() if name in kernel), key + value) / (key + value)
        )

    return flops


def _grouped_rows(recipe: PretrainConfig, work: Work, columns: int, mesh: Mesh) -> Callable[[int, int], float]:
    """With even loads: a device's choices, and a tile more for each two groups that meet in one. The kernels have room
    for more choices (``rounds.ROOM``), whose tiles they pass over."""
    rules, model = recipe.compute.rules, recipe.model
    group = check_exchange(rules, mesh.shape, recipe.compute.dispatch, recipe.compute.dispatch_nodes)
    tokens = recipe.batch_size * (1 if work == "decode" else columns)
    tokens /= recipe.step.microbatches if work == "train" else 1
    ways = math.prod(mesh.shape[name] for name in {*rules.batch, *rules.sequence, *group})
    choices = tokens * model.num_experts_per_tok / ways
    chip = tpu.CHIPS.get(recipe.compute.on(mesh).kernels.chip)
    largest = chip.rows if chip else 1
    return lambda rows, groups: choices + (groups - 1) * tpu.row_tile(rows, groups, largest)


def _attention_of_layer(recipe: PretrainConfig, work: Work, columns: int) -> float:
    model = recipe.model
    if work == "decode":
        return attention_flops(model, columns, absorbed=True) / model.num_hidden_layers * recipe.batch_size
    rows = recipe.batch_size / (recipe.step.microbatches if work == "train" else 1)
    return attention_flops(model, columns // 2) / model.num_hidden_layers * rows * columns


def _turns(scope: str) -> int:
    """Experts' rounds beyond the first, of uneven loads, are not taken; a step of decoding is one."""
    return 0 if "/experts" in scope else 1
