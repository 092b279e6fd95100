"""A weight as it is stored: an array of any dtype, block-scaled values, a layer of a stack of either, some columns.

Each has ``shape`` and ``astype(dtype)``, its values in the dtype that a product computes in. Products take a weight in
this form, so that nothing is cast, dequantised or sliced before the product needs it, and hand its gradient back in it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_kernels.block_fp8 import BlockScaled

Weight = Any  # jax.Array | BlockScaled | InStack | Columns


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InStack:
    """Layer ``layer`` of a stack (L, …), an array or a BlockScaled. The layer may be traced. The gradient is as large
    as the stack: a scan over layers trains on slices of its own, this is for decoding."""

    stack: Any
    layer: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stack.shape[1:]

    @property
    def dtype(self) -> Any:
        return self.stack.dtype

    def __getitem__(self, index: Any) -> "InStack":
        """``[...]``, as an array has it."""
        assert index is Ellipsis, index
        return self

    def astype(self, dtype: Any) -> jax.Array:
        one = lambda leaf: jax.lax.dynamic_index_in_dim(leaf, self.layer, keepdims=False)  # noqa: E731
        return jax.tree.map(one, self.stack).astype(dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Columns:
    """``weight[..., start:stop]`` of a weight that cannot be sliced where it lies, as absorbed MLA reads its keys' half
    and its values' half."""

    weight: Any
    start: int = dataclasses.field(metadata={"static": True})
    stop: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.weight.shape[:-1], self.stop - self.start)

    @property
    def dtype(self) -> Any:
        return self.weight.dtype

    def astype(self, dtype: Any) -> jax.Array:
        return self.weight.astype(dtype)[..., self.start : self.stop]


def block_scaled(w: Weight) -> BlockScaled | None:
    """The weight's FP8 values, of all layers where it is one of a stack; None where it has none."""
    array = w.stack if isinstance(w, InStack) else w
    return array if isinstance(array, BlockScaled) else None


def in_stack(w: Weight, dtype: Any) -> bool:
    """Whether it is a layer of a stack of arrays of ``dtype``, which a kernel can read where it lies."""
    return isinstance(w, InStack) and not isinstance(w.stack, BlockScaled) and w.dtype == dtype


def as_it_lies(w: Weight, dtype: Any) -> bool:
    """Whether it is an array of ``dtype``, or a layer of a stack of such."""
    return in_stack(w, dtype) or (isinstance(w, jax.Array) and w.dtype == dtype)


def stack_and_layer(w: Any) -> tuple[Any, Any]:
    """What a kernel reads a layer of: w's stack and its number there, or w as the only one of a stack."""
    return (w.stack, w.layer) if isinstance(w, InStack) else (w[None], 0)


def stored_gradient(w: Weight, gradient: Callable[[], jax.Array]) -> Any:
    """The gradient, float32 and of ``w.shape``, as the cotangent of w: in the stored dtype. What is stored in blocks or
    as integers has none, and it is not computed."""
    if isinstance(w, Columns):
        rest = w.weight.shape[-1] - w.stop
        return Columns(
            stored_gradient(w.weight, lambda: jnp.pad(gradient(), [(0, 0)] * (len(w.shape) - 1) + [(w.start, rest)])),
            w.start,
            w.stop,
        )
    array = w.stack if isinstance(w, InStack) else w
    if isinstance(array, BlockScaled) or not jnp.issubdtype(array.dtype, jnp.floating):
        return None
    if isinstance(w, InStack):
        zeros = jnp.zeros(array.shape, array.dtype)
        return InStack(jax.lax.dynamic_update_index_in_dim(zeros, gradient().astype(array.dtype), w.layer, 0), None)
    return gradient().astype(array.dtype)
