"""What absorbed MLA keeps of a token, ``[c | k_rope]``: its form in FP8, and how new ones are put behind others.

A token in FP8 is C numbers of e4m3 in groups of 128, a scale for each group, and R rotated ones in bfloat16, which
positions make large and which are a tenth of all: 648 bytes in place of 1,152 for C = 512, R = 64. That is FlashMLA's
form but for the scales, powers of two here, in two bytes instead of four: ``value · scale`` is exact in bfloat16, so
that every implementation computes with the very same numbers. Where numbers are floating, such a scale costs little: of
normal numbers 2.7 % of the norm is lost, with scales ``max / 448`` 2.5 %.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from deepseek_kernels.block_fp8 import BLOCK, E4M3_MAX, FP8
from deepseek_kernels.weights import InStack

_EXPONENTS = -15, 7  # of scales: with them float16, in which Hopper multiplies, holds every value · scale exactly


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FP8Entries:
    """Entries (…, T, C + R) of a cache in FP8, in place of an array: rows (B, T), pages (P, N), a stack of either.

    values: (…, T, C) e4m3. scales: (…, C/128, T) bfloat16, those of a group side by side. rope: (…, T, R) bfloat16.
    A pytree. ``quantise_entries`` makes one; of zeros, an empty one.
    """

    values: Any
    scales: Any
    rope: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.values.shape[:-1], self.values.shape[-1] + self.rope.shape[-1])

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    def astype(self, dtype: Any) -> jax.Array:
        """The entries as one array, (…, T, C + R)."""
        scales = jnp.repeat(jnp.swapaxes(self.scales, -1, -2).astype(jnp.float32), BLOCK, axis=-1)
        latent = (self.values.astype(jnp.float32) * scales).astype(dtype)
        return jnp.concatenate([latent, self.rope.astype(dtype)], axis=-1)


Entries = Any  # jax.Array | FP8Entries | InStack of either


def quantise_entries(entry_BTW: Float[Array, "*B T W"], values: int) -> FP8Entries:
    """Entries to FP8. The first ``values`` numbers are the latent: of each 128 the scale is the smallest power of two
    that brings ``max|c|`` to 448 at most, from 2⁻¹⁵ to 2⁷, and 1 where all are zero; they are rounded to the nearest
    e4m3. What is beyond 57,344 is cut off there, far from a latent, which is normalised.

    Raises:
      ValueError: a latent that is not a multiple of 128 wide, or nothing beside it.
    """
    if values % BLOCK or not 0 < values < entry_BTW.shape[-1]:
        raise ValueError(
            f"entries {entry_BTW.shape}, values={values}: FP8 needs a latent of a multiple of {BLOCK} beside others"
        )
    groups = entry_BTW[..., :values].astype(jnp.float32).reshape(*entry_BTW.shape[:-1], values // BLOCK, BLOCK)
    largest = jnp.max(jnp.abs(groups), axis=-1)
    part, exponent = jnp.frexp(largest / E4M3_MAX)  # part in [0.5, 1): a power of two itself where it is 0.5
    exponent = jnp.where(largest > 0, jnp.clip(exponent - (part == 0.5), *_EXPONENTS), 0)
    scales = jnp.ldexp(jnp.float32(1), exponent)
    latent = (
        jnp.clip(groups / scales[..., None], -E4M3_MAX, E4M3_MAX).astype(FP8).reshape(*entry_BTW.shape[:-1], values)
    )
    scales = jnp.swapaxes(scales, -1, -2).astype(jnp.bfloat16)
    return FP8Entries(latent, scales, entry_BTW[..., values:].astype(jnp.bfloat16))


def write_entries(
    cache: Entries,
    entry_BSW: Num[Array, "B S W"],
    start_B: Int[Array, "B"],
    pages_BJ: Int[Array, "B J"] | None = None,
) -> Entries:
    """The cache with S new tokens of each row behind its first ``start[b]``, brought to FP8 where it is; in place where
    the cache is donated.

    cache: (B, T, W), or pages (P, N, W) with the table ``pages_BJ`` that attention reads (``Visible.pages_BJ``); an
    array, ``FP8Entries``, or a layer of a stack of either, which comes back as such. Token s of row b is written to
    column ``t = start[b] + s``: of pages token ``t % N`` of page ``pages[b, t // N]``. What lies past the last column,
    or on a page below 0 or from P on, is dropped: so a row whose table holds -1 is not written. No two tokens may have
    one place: rows that share pages do not write to them.

    Raises:
      ValueError: shapes that do not fit.
    """
    (B, S, W), (rows, size, width) = entry_BSW.shape, cache.shape
    table = (B,) if pages_BJ is None else pages_BJ.shape[:1]
    if width != W or start_B.shape != (B,) or table != (B,) or (pages_BJ is None and rows != B):
        raise ValueError(
            f"cache {cache.shape}, entries {entry_BSW.shape}, start {start_B.shape}, pages "
            f"{None if pages_BJ is None else pages_BJ.shape}: expected (B, T, W) or (P, N, W), (B, S, W), (B,), (B, J)"
        )
    t_BS = start_B[:, None] + jnp.arange(S, dtype=start_B.dtype)
    if pages_BJ is None:
        row_BS, place_BS = jnp.arange(B)[:, None], jnp.where(t_BS < 0, size, t_BS)
    else:
        J = pages_BJ.shape[1]
        row_BS = jnp.take_along_axis(pages_BJ, jnp.clip(t_BS // size, 0, J - 1), axis=1)
        nowhere_BS = (row_BS < 0) | (row_BS >= rows) | (t_BS < 0) | (t_BS >= J * size)
        beyond_BS = rows + jnp.arange(B * S, dtype=row_BS.dtype).reshape(B, S)  # each elsewhere
        row_BS = jnp.where(nowhere_BS, beyond_BS, row_BS)
        place_BS = t_BS % size
        if B * S == 1 and not isinstance(cache, InStack):
            # XLA rewrites a scatter of one update, and a loop on a CPU then copies all pages: one more is dropped
            row_BS = jnp.concatenate([row_BS, beyond_BS + 1])
            place_BS, entry_BSW = (jnp.concatenate([x, x]) for x in (place_BS, entry_BSW))
    if not isinstance(cache, InStack):
        return _put(cache, (), (row_BS, place_BS), entry_BSW, pages_BJ is not None)
    stack = _put(cache.stack, (cache.layer,), (row_BS, place_BS), entry_BSW, pages_BJ is not None)
    return InStack(stack, cache.layer)


def _put(
    cache: Any, layer: tuple[Any, ...], at: tuple[jax.Array, jax.Array], entry_BSW: jax.Array, unique: bool
) -> Any:
    """unique: no two places are one, be they beyond the cache: a GPU writes several numbers at once."""

    def put(array, at, new):
        return array.at[(*layer, *at)].set(new.astype(array.dtype), mode="drop", unique_indices=unique)

    if not isinstance(cache, FP8Entries):
        return put(cache, at, entry_BSW)
    new, (row, place) = quantise_entries(entry_BSW, cache.values.shape[-1]), at
    groups = jnp.arange(cache.scales.shape[-2])[:, None, None]
    scales = put(cache.scales, (row, groups, place), jnp.swapaxes(new.scales, 0, 1))
    return FP8Entries(put(cache.values, at, new.values), scales, put(cache.rope, at, new.rope))


def side_by_side(cache: Entries, pages_BJ: Int[Array, "B J"] | None, dtype: Any) -> jax.Array:
    """The rows' entries (B, T, W) as one array, gathered from pages where there are any: a copy of them."""
    if pages_BJ is None:
        return cache.astype(dtype)
    stack, layer = (cache.stack, (cache.layer,)) if isinstance(cache, InStack) else (cache, ())
    # Where a row has no page it reads its first once more, and not another's: even by zero NaN makes NaN.
    pages_BJ = jnp.clip(jnp.where(pages_BJ < 0, pages_BJ[:, :1], pages_BJ), 0, cache.shape[0] - 1)
    rows = jax.tree.map(lambda leaf: leaf[(*layer, pages_BJ)], stack).astype(dtype)
    return rows.reshape(rows.shape[0], -1, rows.shape[-1])
