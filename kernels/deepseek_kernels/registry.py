"""Which implementation of an operation runs on which target, in which dtype, and why not a faster one: one table.

Only what is said here decides: no kernel asks which machine traces it. ``python -m deepseek_kernels`` prints the table.
"""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, get_args

import jax
import jax.numpy as jnp

from deepseek_kernels import (
    attention_cudnn,
    attention_hopper,
    attention_splash,
    cpu_few,
    decode_hopper,
    decode_tpu,
    fp8_on_hopper,
    grouped_tpu,
    hopper,
    hopper_by_head,
    hopper_few,
    integers,
    norm_hopper,
    router_hopper,
)
from deepseek_kernels.block_fp8 import FP8, BlockScaled
from deepseek_kernels.target import Platform, Target
from deepseek_kernels.weights import Columns, Weight, block_scaled

ANYWHERE: tuple[Platform, ...] = get_args(Platform)


@dataclasses.dataclass(frozen=True)
class Choice:
    """name: the implementation. rows: what a group's rows should start on multiples of. reason: why it is a slow one,
    "" where it is not."""

    name: str
    rows: int = 1
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Implementation:
    """platforms: where it is chosen by itself if it does not refuse; elsewhere it must be named. refuses: why it cannot
    run, "" where it can. rows: the alignment. slow: the reason where no faster one of the platform has refused.
    copies: what it does with the weight or the cache before it multiplies, "" where it reads it as it lies or casts an
    array.
    special: made for some shapes alone, so that another is no slow choice where it refuses."""

    name: str
    platforms: tuple[Platform, ...] = ANYWHERE
    refuses: Callable[..., str] = lambda target, dtype, **facts: ""
    rows: Callable[..., int] = lambda target, **facts: 1
    slow: str = ""
    copies: Callable[..., str] = lambda dtype, **facts: ""
    special: bool = False


def _needs_c(target: Target, dtype: Any, **_) -> str:
    return cpu_few.needs_c(target, dtype)


def _needs_c_and_one_device(target: Target, dtype: Any, *, devices: int = 1, **_) -> str:
    return f"it needs whole operands, not a mesh of {devices}" if devices > 1 else _needs_c(target, dtype)


def _block_rows(target: Target, *, rows: int, groups: int, **_) -> int:
    """A power of two, at most a group's mean size: padding a group costs half a block on average, a small block one
    more copy of its group's matrix. Measured best: half the mean, 64 at most, on a CPU; the mean, 1024 at most, on a
    GPU."""
    on_cpu = target.platform == "cpu"
    best = max(1, rows // max(groups, 1) // (2 if on_cpu else 1))
    return min(64 if on_cpu else 1024, 1 << (best.bit_length() - 1))


def _hopper_rows(target: Target, *, rows: int, groups: int, **_) -> int:
    return hopper_few.tile(rows, groups) or hopper.ROWS


def _dequantises(dtype: Any, *, weight: Weight = None, **_) -> str:
    weight = weight.weight if isinstance(weight, Columns) else weight
    return "" if block_scaled(weight) is None else f"a copy of the weight in {dtype.name}"


def _dequantises_what_does_not_fit(dtype: Any, *, weight: Weight = None, **_) -> str:
    copy = _dequantises(dtype, weight=weight)
    return f"{copy}: {why}" if copy and (why := fp8_on_hopper.does_not_fit(weight)) else ""


def _not_by_matrix(target: Target, dtype: Any, *, weight: Weight = None, **facts) -> str:
    if not integers.in_integers(block_scaled(weight)):
        return "it is for integers"
    ours = not hopper.refuses(target, dtype, **facts) and not fp8_on_hopper.does_not_fit(weight)
    return "hopper reads them where they lie" if ours else ""


def _no_integers(target: Target, dtype: Any, *, weight: Weight = None, **_) -> str:
    return "it needs floats" if integers.in_integers(block_scaled(weight)) else _needs_c(target, dtype)


def _copies_the_cache(dtype: Any, *, page: int = 0, fp8: bool = False, **_) -> str:
    return f"a copy of the rows' entries in {dtype.name}" if page or fp8 else ""


_C = Implementation("c", ("cpu",), _needs_c)
_CUDNN = Implementation("cudnn", ("cuda",), attention_cudnn.refuses)
_SPLASH = Implementation("splash", ("tpu",), attention_splash.refuses)
_BLOCKWISE = Implementation("blockwise", slow="plain XLA, there is no kernel for this target")
_REFERENCE = Implementation("reference", ())
_BY_PARTS = "integers are dequantised a matrix at a time, there is no kernel for them and this target"

# The first that is chosen by itself on the platform and does not refuse is taken.
TABLE: dict[str, tuple[Implementation, ...]] = {
    # XLA's; with "c" the weight's gradient by the C kernel; "c_few" and Hopper's are of few rows, as decoding has them.
    "product": (
        Implementation("c_few", ("cpu",), cpu_few.refuses_product, special=True),
        dataclasses.replace(_C, refuses=_needs_c_and_one_device, copies=_dequantises, special=True),
        Implementation("hopper", ("cuda",), hopper_few.refuses_dense, special=True),
        Implementation("hopper_by_head", ("cuda",), hopper_by_head.refuses_by_head, special=True),
        Implementation("dot", copies=_dequantises),
    ),
    "grouped_matmul": (
        Implementation("c_integers", ("cpu",), integers.refuses_c, special=True),
        Implementation("by_matrix", refuses=_not_by_matrix, rows=_block_rows, slow=_BY_PARTS, special=True),
        dataclasses.replace(_C, copies=_dequantises),
        Implementation("hopper", ("cuda",), hopper.refuses, _hopper_rows, copies=_dequantises_what_does_not_fit),
        Implementation("hopper_fp8", (), fp8_on_hopper.refuses_fp8_rows, _hopper_rows),  # rounds x: by name alone
        Implementation("megablox", ("tpu",), grouped_tpu.refuses, copies=_dequantises),
        Implementation("ragged_dot", ("tpu",), copies=_dequantises),
        Implementation("blocks", rows=_block_rows, slow="batched XLA products over padded blocks", copies=_dequantises),
        dataclasses.replace(_REFERENCE, copies=_dequantises),
    ),
    # With a weight in FP8 or in integers.
    "fp8_matmul": (
        Implementation("c", ("cpu",), integers.refuses_c, special=True),
        Implementation("hopper", ("cuda",), fp8_on_hopper.refuses),
        Implementation("hopper_fp8", (), fp8_on_hopper.refuses_fp8_rows),
        Implementation("dequantised", slow="a copy of the weight in the dtype of the product"),
        _REFERENCE,
    ),
    "routed_experts": (
        Implementation("fused", ("cpu",), _no_integers, special=True),
        Implementation("sorted"),
        Implementation("plain", ()),
    ),
    # "sorted" adds up a row's gradients in one order always; a GPU's scatter takes them as they come.
    "look_up": (Implementation("sorted", ("cuda", "rocm")), Implementation("scatter")),
    "mla_attention": (
        _C,
        Implementation("hopper", ("cuda",), attention_hopper.refuses),
        _CUDNN,
        _SPLASH,
        _BLOCKWISE,
        _REFERENCE,
    ),
    "gqa_attention": (
        _C,
        _CUDNN,
        Implementation("hopper", ("cuda",), attention_hopper.refuses_grouped),
        _SPLASH,
        _BLOCKWISE,
        _REFERENCE,
    ),
    "mla_decode": (
        Implementation("hopper", ("cuda",), decode_hopper.refuses),
        Implementation("tpu", ("tpu",), decode_tpu.refuses),
        Implementation("c", ("cpu",), cpu_few.refuses_paged, special=True),
        dataclasses.replace(_BLOCKWISE, copies=_copies_the_cache),
        _REFERENCE,
    ),
    # "rows": gqa_attention over a copy of the rows' entries.
    "gqa_decode": (
        Implementation("c", ("cpu",), cpu_few.refuses_paged, special=True),
        Implementation("rows", copies=_copies_the_cache),
    ),
    # Scores and choice; Hopper's kernels are of few tokens.
    "router": (Implementation("hopper", ("cuda",), router_hopper.refuses, special=True), Implementation("plain")),
    # XLA's; "hopper" is of few rows.
    "rms_norm": (Implementation("hopper", ("cuda",), norm_hopper.refuses, special=True), Implementation("plain")),
}


def choose(operation: str, target: Target, dtype: Any, *, implementation: str = "auto", **facts: Any) -> Choice:
    """The implementation of an operation for a target, a dtype and the facts that the operation's rules read.

    facts: of product those of ``refuses`` in ``cpu_few``, ``hopper_few`` and ``hopper_by_head``, of grouped_matmul
    ``rows, groups, widths``, of both for FP8 ``weight``, of fp8_matmul those of ``fp8_on_hopper.refuses``; of
    mla_attention and gqa_attention those of ``attention_splash.refuses``, of mla_decode, gqa_decode, router and
    rms_norm those of ``refuses`` in ``decode_hopper``, ``cpu_few``, ``router_hopper`` and ``norm_hopper``; of the
    others none. A slow choice is logged once, with its reason.

    Raises:
      ValueError: an operation or implementation that does not exist, or one that cannot run there.
    """
    if operation not in TABLE:
        raise ValueError(f"operation={operation!r}: expected one of {', '.join(TABLE)}")
    dtype, rows = jnp.dtype(dtype), TABLE[operation]
    if implementation != "auto":
        named = next((row for row in rows if row.name == implementation), None)
        if named is None:
            names = ", ".join(["auto", *(row.name for row in rows)])
            raise ValueError(f"implementation={implementation!r} of {operation}: expected one of {names}")
        if why := named.refuses(target, dtype, **facts):
            raise ValueError(f"implementation={implementation!r} of {operation} cannot run on {target}: {why}")
        return _said(operation, target, dtype, named, [named.copies(dtype, **facts)], facts)
    refusals = []
    for row in rows:
        if target.platform not in row.platforms:
            continue
        if why := row.refuses(target, dtype, **facts):
            refusals += [] if row.special else [f"not {row.name}: {why}"]
            continue
        copied = row.copies(dtype, **facts)
        # A warning, which is seen by default, where the platform has a faster one.
        return _said(operation, target, dtype, row, [*(refusals or [row.slow]), copied], facts, warn=bool(refusals))
    raise AssertionError(f"no implementation of {operation} for {target}")


def _said(operation, target, dtype, row: Implementation, reasons, facts, *, warn: bool = False) -> Choice:
    """The choice of a row; why it is slow is logged, a copy of the weight on a GPU as a warning."""
    choice = Choice(row.name, row.rows(target, **facts), "; ".join(filter(None, reasons)))
    if choice.reason:
        warn = warn or (bool(reasons[-1]) and target.platform == "cuda")
        what = f"{operation} in {dtype.name} on {target}: {choice.name}, {choice.reason}"
        say(level := logging.WARNING if warn else logging.INFO, what)
        for told in _LISTENING:
            told[what] = level
    return choice


@functools.cache
def say(level: int, what: str) -> None:
    """Once: a slower path is never taken in silence."""
    logging.getLogger("deepseek_kernels").log(level, "%s", what)


_LISTENING: list[dict[str, int]] = []


@contextlib.contextmanager
def listening() -> Iterator[dict[str, int]]:
    """What slow choices have to say within, also where it has been said, with its level: who keeps a program that was
    traced within has to ``say`` it where it is used again."""
    told: dict[str, int] = {}
    _LISTENING.append(told)
    try:
        yield told
    finally:
        _LISTENING[:] = [other for other in _LISTENING if other is not told]


# V2-Lite's training step, and decoding: what the printed table is about.
_ROWS = {"in_row_order": True, "queries": 4096, "keys": 4096}
_FP8 = BlockScaled(jax.ShapeDtypeStruct((2048, 1408), FP8), jax.ShapeDtypeStruct((16, 11), jnp.float32))
_TYPICAL: dict[str, dict[str, Any]] = {
    "fp8_matmul": {"weight": _FP8},
    "grouped_matmul": {"rows": 6 * 4096, "groups": 64, "widths": (2048, 2816)},
    "mla_attention": _ROWS | {"key_width": 192, "value_width": 128},
    "gqa_attention": _ROWS | {"key_width": 128, "value_width": 128},
    "mla_decode": {"by_column": True, "queries": 1, "keys": 4096, "key_width": 576, "value_width": 512},
    "gqa_decode": {"by_column": True, "queries": 1, "keys": 4096, "key_width": 128, "value_width": 128},
    "router": {"tokens": 4096, "weight": jax.ShapeDtypeStruct((2048, 64), jnp.float32), "limited": False},
    "rms_norm": {"rows": 4096, "width": 2048, "devices": 1},
}


def table(target: Target, dtype: Any) -> dict[str, Choice]:
    """What every operation runs as on a target, at the shapes of V2-Lite's training step."""
    return {operation: choose(operation, target, dtype, **_TYPICAL.get(operation, {})) for operation in TABLE}
