"""Absorbed MLA's attention in decoding on TPUs, in Pallas' Mosaic: any lengths, the cache where it lies, rows of it or
pages, in bfloat16 or FP8.

A row's query tokens and heads are the rows of one matrix; its keys come in blocks, as many as its longest query sees.
The blocks of all rows of the batch lie end to end and are dealt out evenly to the cores that share a device (two of a
v5p, one of others), which sum them up with the running maximum of an online softmax; a row that two cores share is put
together from the two sums after the kernel. A block may be several pages: each is an operand of its own, with the whole
cache behind it, so that the grid's pipeline fetches them all.

FP8 is converted in the kernel, but never multiplied by its scales: those, of a group of 128 numbers and a key, multiply
scores of the group, and weights for its values, where keys lie along lanes as in the scales.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from deepseek_kernels import tpu
from deepseek_kernels.block_fp8 import BLOCK
from deepseek_kernels.cached import FP8Entries
from deepseek_kernels.decode_tpu_plan import Blocks, make_plan
from deepseek_kernels.target import Target
from deepseek_kernels.visible import Visible

_ROWS = 512  # of a tile of queries, at most
_UNIT = 16  # rows of bfloat16 that lie together
_SCORES = 1 << 18  # of a block, at most: 1 MiB in float32, some four times at once
_LOWEST = float(jnp.finfo(jnp.float32).min)


def refuses(
    target: Target,
    dtype: Any,
    *,
    by_column: bool,
    queries: int,
    keys: int,
    key_width: int,
    value_width: int,
    page: int = 0,
    fp8: bool = False,
    **_: Any,
) -> str:
    """Why the kernel cannot run; "" where it can. page: tokens of one, 0 where rows lie whole."""
    if why := tpu.refuses(target, dtype):
        return why
    if not by_column:
        return "it needs keys whose positions are their columns, and no segments"
    if not keys or value_width % tpu.LANES:
        return f"it needs keys, and values that are a multiple of {tpu.LANES} wide, not {keys} and {value_width}"
    if page % tpu.LANES and page != tpu.LANES // 2:
        return f"it needs pages of {tpu.LANES // 2} tokens or of a multiple of {tpu.LANES}, not {page}"
    return ""


@functools.partial(jax.jit, static_argnames=("scale", "values", "chip"))  # lowered once for all layers
def attend(
    q_BSHW: Float[Array, "B S H W"],
    cache: Float[Array, "L P N W"] | FP8Entries,
    layer: Any,
    visible: Visible,
    scale: float,
    *,
    values: int,
    chip: str,
) -> Float[Array, "B S H C"]:
    """``out[s] = Σ_t softmax_t(q[s]·entry[t] · scale) entry[t, :C]`` over layer ``layer`` of the cache: pages, or
    rows, of which each is one page; zeros for a query that sees no key. Scores, softmax and sums are float32; weights
    are rounded to bfloat16 for their product.

    values: C.
    """
    (B, S, H, W), (_, pages, size, _) = q_BSHW.shape, cache.shape
    table_BJ = jnp.arange(B)[:, None] if visible.pages_BJ is None else jnp.clip(visible.pages_BJ, 0, pages - 1)
    T = size * table_BJ.shape[1]
    tiles = pl.cdiv(S * H, _ROWS)
    rows = pl.cdiv(S * H, _UNIT * tiles) * _UNIT
    fitting = max(tpu.LANES, _SCORES // rows // tpu.LANES * tpu.LANES)
    most = min(tpu.CHIPS[chip].keys, fitting, pl.cdiv(T, tpu.LANES) * tpu.LANES)
    blocks = Blocks.of(size, table_BJ.shape[1], most)
    limit_BS = visible.limits(B, S, T)
    fit = lambda x: jnp.pad(x, [(0, 0), (0, rows * tiles - S * H), (0, 0)])  # noqa: E731
    limit_BR1 = fit(jnp.repeat(limit_BS, H, axis=1)[..., None])
    plan = make_plan(jnp.max(limit_BS, axis=1), blocks.keys, pl.cdiv(T, blocks.keys), tpu.CHIPS[chip].cores)
    q_BRW, number = fit(q_BSHW.reshape(B, S * H, W)), jnp.asarray(layer, jnp.int32).reshape(1)
    table = table_BJ.astype(jnp.int32).reshape(-1)
    sums, logs = _parts(plan, number, table, limit_BR1, q_BRW, cache, blocks, scale, values, rows)
    out_BRC = _combine(plan, sums, logs).astype(q_BSHW.dtype)
    return out_BRC[:, : S * H].reshape(B, S, H, values)


def _parts(plan, number, table, limit_BR1, q_BRW, cache, blocks, scale, values, rows):
    """Of each part ``Σ p v / Σ p`` (P R C) and ``log Σ p`` (P R 1)."""
    B, R, W = q_BRW.shape
    parts, J = B + plan.cores - 1, len(table) // B
    kept = jax.tree.leaves(cache)
    read = _FP8(blocks, values) if len(kept) > 1 else _BFloat16(blocks, values)

    def of_row(core, tile, step, row_N, start_B, share, number, table):
        return _place(core, step, row_N, share)[1], tile, 0

    def of_cache(part, axis, core, tile, step, row_N, start_B, share, number, table):
        block, row = _place(core, step, row_N, share)
        piece = jnp.clip((block - start_B[row]) * blocks.parts + part, 0, blocks.of_row - 1)
        at, of_page = [0, 0], jnp.int32(blocks.of_page)
        at[axis] = jax.lax.rem(piece, of_page)
        return number[0], table[row * J + jax.lax.div(piece, of_page)], *at

    def of_part(core, tile, step, row_N, start_B, share, number, table):
        return _place(core, step, row_N, share)[1] + core, tile, 0

    queries = lambda width, where: pl.BlockSpec((None, rows, width), where)  # noqa: E731
    pieces = [
        pl.BlockSpec((None, None, *shape), functools.partial(of_cache, part, axis))
        for part in range(blocks.parts)
        for shape, axis in read.pieces(W)
    ]
    seen = B * J * blocks.size  # were all rows whole
    token = sum(leaf.dtype.itemsize * leaf.size for leaf in kept) // (cache.shape[0] * cache.shape[1] * blocks.size)
    return pl.pallas_call(
        functools.partial(_kernel, read, scale),
        out_shape=[
            # Rounded once, where nothing is put together.
            jax.ShapeDtypeStruct((parts, R, values), q_BRW.dtype if plan.cores == 1 else jnp.float32),
            jax.ShapeDtypeStruct((parts, R, 1), jnp.float32),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(plan.cores, R // rows, plan.share[0]),
            in_specs=[queries(1, of_row), queries(W, of_row), *pieces],
            out_specs=[queries(values, of_part), queries(1, of_part)],
            scratch_shapes=[pltpu.VMEM((rows, width), jnp.float32) for width in (1, 1, values)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * seen * R * (W + values), bytes_accessed=seen * token, transcendentals=seen * R
        ),
        name="mla_decode",
    )(plan.row_N, plan.start_B, plan.share, number, table, limit_BR1, q_BRW, *kept * blocks.parts)


def _place(core, step, row_N, share):
    """Which block of all a core's ``step``-th is, and its row."""
    block = jnp.minimum(core * share[0] + step, share[1] - 1)
    return block, row_N[block]


def _kernel(read, scale, row_N, start_B, share, number, table, limit, q, *refs):
    """A block of keys for a tile of its row's queries: as the row begins all is set to nothing, as it ends written."""
    *pieces, out, log, top, total, acc = refs
    blocks, each, rows = read.blocks, len(read.pieces(q.shape[1])), q.shape[0]
    pieces = [pieces[i : i + each] for i in range(0, len(pieces), each)]
    core, step = pl.program_id(0), pl.program_id(2)
    block, row = _place(core, step, row_N, share)
    there = core * share[0] + step < share[1]

    @pl.when((step == 0) | (row_N[jnp.maximum(block - 1, 0)] != row))
    def _():
        top[...] = jnp.full_like(top, _LOWEST)
        total[...], acc[...] = jnp.zeros_like(total), jnp.zeros_like(acc)

    @pl.when(there)
    def _():
        own = block - start_B[row]
        scores = [read.scores(q, piece) for piece in pieces]
        scores = jnp.concatenate(scores, axis=1) if len(scores) > 1 else scores[0]
        column = own * blocks.keys + jax.lax.broadcasted_iota(jnp.int32, (rows, blocks.keys), 1)
        seen = column < limit[...]
        scores = jnp.where(seen, scores * scale, _LOWEST)
        higher = jnp.maximum(top[...], jnp.max(scores, axis=1, keepdims=True))
        p, shrink = jnp.where(seen, jnp.exp(scores - higher), 0), jnp.exp(top[...] - higher)
        top[...], total[...] = higher, total[...] * shrink + jnp.sum(p, axis=1, keepdims=True)
        acc[...] *= shrink
        for i, piece in enumerate(pieces):
            read.add(acc, p[:, i * blocks.piece : (i + 1) * blocks.piece], piece, i, own)

    following = jnp.minimum(block + 1, share[1] - 1)

    @pl.when(there & ((step == share[0] - 1) | (block == share[1] - 1) | (row_N[following] != row)))
    def _():
        sums = jnp.where(total[...] > 0, total[...], 1)
        out[...] = (acc[...] / sums).astype(out.dtype)
        log[...] = jnp.where(total[...] > 0, top[...] + jnp.log(sums), _LOWEST)


class _BFloat16(NamedTuple):
    """How a piece of the cache is read: one array of entries."""

    blocks: Blocks
    values: int

    def pieces(self, width: int):
        """The shapes of a piece's arrays, and the axis along which keys are."""
        return [((self.blocks.piece, width), 0)]

    def scores(self, q, piece):
        return _product(q[...], piece[0][...], 1)

    def add(self, acc, p, piece, part: int, block) -> None:
        v = piece[0][:, : self.values]
        there = self.blocks.there(part, v.shape, 0, block)
        if there is not None:  # what sticks out of the cache is anything, NaN too
            v = jnp.where(there, v, 0)
        acc[...] += _product(p.astype(v.dtype), v, 0)


class _FP8(_BFloat16):
    """The same of values, scales and the rotated part."""

    def pieces(self, width: int):
        size, groups = self.blocks.piece, self.values // BLOCK
        return [((size, self.values), 0), ((groups, size), 1), ((size, width - self.values), 0)]

    def scores(self, q, piece):
        numbers, scales, rope = piece
        scores = _product(q[:, self.values :], rope[...], 1)
        for g in range(self.values // BLOCK):
            of_group = slice(g * BLOCK, (g + 1) * BLOCK)
            part = _product(q[:, of_group], numbers[:, of_group].astype(q.dtype), 1)
            scores += part * scales[g : g + 1, :].astype(jnp.float32)
        return scores

    def add(self, acc, p, piece, part: int, block) -> None:
        numbers, scales, _ = piece
        for g in range(self.values // BLOCK):
            of_group = slice(g * BLOCK, (g + 1) * BLOCK)
            v, scale = numbers[:, of_group].astype(jnp.bfloat16), scales[g : g + 1, :].astype(jnp.float32)
            there = self.blocks.there(part, v.shape, 0, block)
            in_scales = self.blocks.there(part, scale.shape, 1, block)
            if there is not None and in_scales is not None:
                v, scale = jnp.where(there, v, 0), jnp.where(in_scales, scale, 0)
            acc[:, of_group] += _product((p * scale).astype(jnp.bfloat16), v, 0)


def _product(a, b, axis: int):
    """(rows, keys or values): a's last axis with ``axis`` of b."""
    return jax.lax.dot_general(a, b, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)


def _combine(plan, sums, logs):
    """Σ_p w_p · sums_p of each row's parts p, with weights in proportion to what each was divided by."""
    if plan.cores == 1:
        return sums
    first_B, count_B = plan.parts_B2[:, 0], plan.parts_B2[:, 1]
    place = jnp.arange(plan.cores)[:, None]
    there = (place < count_B)[..., None, None]
    at = jnp.where(place < count_B, first_B + place, first_B)
    sums, logs = jnp.where(there, sums[at], 0), jnp.where(there, logs[at], _LOWEST)
    return jnp.sum(jax.nn.softmax(logs, axis=0) * sums, axis=0)
