"""FP8 weights with one scale per block of 128 × 128, as DeepSeek-V3 is released.

``W = W8 · scale_inv[block]``: despite its name the stored scale is the multiplier. Values are e4m3 (at most 448),
scales float32, and the last blocks of a matrix may be ragged.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

BLOCK = 128  # rows and columns that share a scale
E4M3_MAX = 448.0
FP8 = jnp.float8_e4m3fn
Groups = tuple[tuple[int, int], ...]
MATRIX: Groups = ((1, BLOCK), (1, BLOCK))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockScaled:
    """A weight kept in FP8, or in integers (integers.py): in place of an array wherever it is read as
    ``weight[...].astype(dtype)``.

    values: FP8, int8 or int4, of any layout. groups: for each axis of the scales' end, (axes of ``values`` merged into
    it, entries that share a scale); the axes before are the same in both. ``((1, 128), (1, 128))`` is a matrix, and
    with it (..., I, O) values have (..., ⌈I/128⌉, ⌈O/128⌉) scales. A pytree, so ``scan`` and indexing slice both.
    terms_last: the first group's axes, which a product sums over, lie behind the others in ``values`` and ``scales``,
    though not in ``shape``: as a checkpoint has them, and as FP8 tensor cores read them. Where each output has scales
    of its own, the scales stay: kernels read those of a group of terms side by side.
    """

    values: Any
    scales: Any
    groups: Groups = dataclasses.field(default=MATRIX, metadata={"static": True})
    terms_last: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        shape, terms = self.values.shape, self.groups[0][0]
        if not self.terms_last:
            return shape
        lead = len(shape) - sum(axes for axes, _ in self.groups)
        return (*shape[:lead], *shape[-terms:], *shape[lead:-terms])

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    @property
    def own_scales(self) -> bool:
        """Whether each output has scales of its own, shared by a group of its terms alone."""
        return all(block == 1 for _, block in self.groups[1:])

    def __getitem__(self, index: Any) -> "BlockScaled":
        """``[...]``, or one entry of the first axis, which must not be one of the groups'."""
        if index is Ellipsis:
            return self
        if self.values.ndim <= sum(axes for axes, _ in self.groups):
            raise IndexError(f"BlockScaled{self.shape}: the first axis belongs to the scales' blocks {self.groups}")
        return dataclasses.replace(self, values=self.values[index], scales=self.scales[index])

    def with_terms_last(self, last: bool = True) -> "BlockScaled":
        """The same weight, its memory in this order."""
        if last == self.terms_last:
            return self
        axes, rest = self.groups[0][0], sum(axes for axes, _ in self.groups[1:])

        def moved(array, axes, rest):
            count, by = (axes, rest) if last else (rest, axes)
            lead = array.ndim - count - by
            order = (*range(lead), *range(lead + count, array.ndim), *range(lead, lead + count))
            return jnp.transpose(array, order)

        values, scales = moved(self.values, axes, rest), self.scales
        if not self.own_scales:
            scales = moved(scales, 1, len(self.groups) - 1)
        return BlockScaled(values, scales, self.groups, last)

    def astype(self, dtype: Any) -> jax.Array:
        """Dequantise: ``values · scale`` in float32, rounded once to ``dtype``."""
        if self.terms_last:
            return self.with_terms_last(False).astype(dtype)
        lead, sizes = split_shape(self.shape, self.groups)
        scales = self.scales
        for axis, (size, (_, block)) in enumerate(zip(sizes, self.groups, strict=True), start=len(lead)):
            if block > 1:
                scales = jax.lax.slice_in_dim(jnp.repeat(scales, block, axis=axis), 0, size, axis=axis)
        merged = self.values.reshape(*lead, *sizes).astype(jnp.float32)
        return (merged * scales).astype(dtype).reshape(self.shape)


def split_shape(shape: tuple[int, ...], groups: Groups) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(the leading axes, the size of each group's merged axes) of a BlockScaled of this shape."""
    at = len(shape) - sum(axes for axes, _ in groups)
    lead, sizes = shape[:at], []
    for axes, _ in groups:
        sizes.append(math.prod(shape[at : at + axes]))
        at += axes
    return lead, tuple(sizes)


def scales_shape(shape: tuple[int, ...], groups: Groups) -> tuple[int, ...]:
    """The shape of the scales that belong to values of ``shape``."""
    lead, sizes = split_shape(shape, groups)
    return (*lead, *(-(-size // block) for size, (_, block) in zip(sizes, groups, strict=True)))


def quantise(w_OI: Float[Array, "O I"]) -> tuple[Float[Array, "O I"], Float[Array, "o i"]]:
    """(FP8 values, float32 ``scale_inv``) of a matrix: ``scale = max|block| / 448``, 1 for a block of zeros."""
    rows, columns = w_OI.shape
    padded = jnp.pad(w_OI.astype(jnp.float32), ((0, -rows % BLOCK), (0, -columns % BLOCK)))
    blocks = padded.reshape(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    largest = jnp.max(jnp.abs(blocks), axis=(1, 3))
    scale = jnp.where(largest > 0, largest / E4M3_MAX, 1.0)
    # Division by a subnormal scale could pass 448, which e4m3fn answers with NaN.
    scaled = jnp.clip(blocks / scale[:, None, :, None], -E4M3_MAX, E4M3_MAX)
    return scaled.reshape(padded.shape)[:rows, :columns].astype(FP8), scale


def quantise_rows(x_TD: Float[Array, "T D"]) -> tuple[Float[Array, "T D"], Float[Array, "K T"]]:
    """(FP8 values, float32 scales) of activations: each 128 numbers of a row have ``scale = max|x| / 448``, 1 where all
    are zero. D is a multiple of 128; the scales lie as (D/128, T), those of a block of terms side by side."""
    rows, width = x_TD.shape
    assert width % BLOCK == 0, width
    blocks_TKB = x_TD.astype(jnp.float32).reshape(rows, width // BLOCK, BLOCK)
    largest_TK = jnp.max(jnp.abs(blocks_TKB), axis=2)
    scale_TK = jnp.where(largest_TK > 0, largest_TK / E4M3_MAX, 1.0)
    scaled = jnp.clip(blocks_TKB / scale_TK[..., None], -E4M3_MAX, E4M3_MAX)
    return scaled.astype(FP8).reshape(rows, width), scale_TK.T


def dequantise(w8_OI: Float[Array, "O I"], scale_inv: Float[Array, "o i"], dtype: Any = jnp.bfloat16) -> jax.Array:
    """The matrix that ``quantise`` stored. ValueError where the scales do not fit the blocks."""
    if scale_inv.shape != scales_shape(w8_OI.shape, MATRIX):
        raise ValueError(
            f"values of {w8_OI.shape} need scales of {scales_shape(w8_OI.shape, MATRIX)}, got {scale_inv.shape}"
        )
    return BlockScaled(w8_OI, scale_inv).astype(dtype)


def dequantise_reference(w8_OI: jax.Array, scale_inv: jax.Array, dtype: Any = jnp.bfloat16) -> jax.Array:
    """The formula entry by entry: ``W[o, i] = W8[o, i] · scale_inv[o // 128, i // 128]``."""
    rows, columns = (jnp.arange(size) // BLOCK for size in w8_OI.shape)
    return (w8_OI.astype(jnp.float32) * scale_inv[rows][:, columns]).astype(dtype)
