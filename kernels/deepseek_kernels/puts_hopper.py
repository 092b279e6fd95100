"""Rows put into the memory of a host's other GPUs over NVLink, in Pallas' Mosaic GPU: gathered and sent in one pass.

A block fetches a tile's rows into shared memory one by one and stores them as a whole where another device reads them.
Kernels of other devices write into this one's buffer, which must be there before the first starts and is read when all
have ended: sums over the devices before and behind the kernel see to that. (Semaphores of the kernel's own cannot: jax
fills them with zeros when a device comes to the kernel, and signals of others may have come by then.)
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_kernels.target import Target

ROWS = 8  # of a tile
_COLUMNS = 256  # of a row that are fetched at once
_BLOCKS, _STAGES, _SHARED = 132, 6, 200 << 10


def refuses(target: Target, row_bytes: int) -> str:
    """Why rows of so many bytes cannot be put; "" where they can."""
    if target.platform != "cuda" or target.chip != "9.0":
        return f"it needs Hopper GPUs, not {target}"
    if jax.__version_info__ < (0, 11):
        return f"it needs jax 0.11, not {jax.__version__}"
    if jax.process_count() > 1:
        return "it needs all GPUs in one process"
    if row_bytes % (2 * _COLUMNS) or 2 * ROWS * row_bytes > _SHARED:
        return f"it needs rows of multiples of {2 * _COLUMNS} bytes up to {_SHARED // 2 // ROWS}, not {row_bytes}"
    return ""


def put_rows(
    x_TD: Float[Array, "T D"], token_NR: Int[Array, "N R"], *, axis: str
) -> tuple[Float[Array, "N R D"], Int[Array, ""]]:
    """``y[n, r]`` is row ``token[m, r]`` of device n, for m this device's place among the N along the mesh's ``axis``;
    inside a ``shard_map``. Bytes are copied: rows may be of any dtype.

    Beside it 0, which is there when all devices have ended: add it to what is needed for reading y."""
    (ways, rows), (tokens, width) = token_NR.shape, x_TD.shape
    wide, columns = width * x_TD.dtype.itemsize // (2 * _COLUMNS), 2 * _COLUMNS // x_TD.dtype.itemsize
    x, buffer = x_TD.reshape(tokens, wide, columns), jax.lax.empty((ways, rows, wide, columns), x_TD.dtype)
    # Of x, the buffer is no constant: jax would take one out of what is differentiated in a scan, and refuse the ref.
    x, buffer = jax.lax.optimization_barrier((x, buffer))
    token_NR += _met(x[0, 0, 0], buffer[0, 0, 0, 0], axis)
    y = jax.new_ref(buffer)
    stages = min(_STAGES, _SHARED // (ROWS * wide * 2 * _COLUMNS))
    plgpu.kernel(
        functools.partial(_put, axis=axis, shape=token_NR.shape, stages=stages),
        grid=(_BLOCKS,),
        grid_names=("block",),
        scratch_types=[
            plgpu.SMEM((stages, ROWS, wide, columns), x.dtype),
            plgpu.Barrier(num_arrivals=ROWS, num_barriers=stages),
        ],
    )(x, token_NR.reshape(-1), y)
    found = jax.freeze(y)
    return found.reshape(ways, rows, width), _met(found[0, 0, 0, 0], found[-1, -1, -1, -1], axis)


def _met(one: jax.Array, other: jax.Array, axis: str) -> jax.Array:
    """0, which no device has before all have both numbers; what it is XLA does not know."""
    nothing = 0 * one.astype(jnp.float32) + 0 * other.astype(jnp.float32)
    return (jax.lax.psum(nothing, axis) < 0).astype(jnp.int32)


def _put(x, token, y, tile, ready, *, axis, shape, stages):
    (ways, rows), block = shape, jax.lax.axis_index("block")
    me, count = jax.lax.axis_index(axis), (rows // ROWS - block + _BLOCKS - 1) // _BLOCKS

    def fetch(part, i, stage):
        first = part * rows + (block + i * _BLOCKS) * ROWS
        for r in range(ROWS):
            plgpu.copy_gmem_to_smem(x.at[token[first + r]], tile.at[stage, r], ready.at[stage])

    def send(part, target):
        for i in range(stages - 1):
            pl.when(i < count)(functools.partial(fetch, part, i, i))

        @pl.loop(0, count)
        def _(i):
            stage, ahead = jax.lax.rem(i, stages), i + stages - 1
            plgpu.barrier_wait(ready.at[stage])
            place = pl.ds((block + i * _BLOCKS) * ROWS, ROWS)
            plgpu.copy_smem_to_gmem(tile.at[stage], target.at[me, place])
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # what was stored before is free
            pl.when(ahead < count)(lambda: fetch(part, ahead, jax.lax.rem(ahead, stages)))

        plgpu.wait_smem_to_gmem(0, wait_read_only=False)

    for step in range(1, ways):  # at any time each device has another target
        other = jax.lax.rem(me + step, ways)
        send(other, plgpu.remote_ref(y, {axis: other}))  # pyright: ignore  # by the mesh's axis
    send(me, y)
