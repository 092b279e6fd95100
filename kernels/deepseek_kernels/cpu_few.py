"""What decoding does on a CPU, by C kernels: products of few rows (``cpu_few.h``; with AMX ``cpu_tiles.h``), attention
over pages (``cpu_paged.h``)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_kernels import cpu
from deepseek_kernels.target import Target

MULTIPLE = 32  # of widths: two vectors of the widest registers
ROWS = 64  # above, XLA's product of a float32 weight is as fast
ROWS_OF_BFLOAT16 = 512  # which XLA would make a copy of in float32
DTYPES = (jnp.dtype("float32"), jnp.dtype("bfloat16"))


def refuses_product(target: Target, dtype: Any, *, devices: int = 1, lying: Any = None, **_) -> str:
    """Why the product cannot, or should not, be the C kernel's. lying: (rows, (summed, new) widths, the weight's dtype)
    of a product with one matrix as it is stored."""
    if why := needs_c(target, dtype):
        return why
    if devices > 1 or lying is None:
        return "it needs a whole matrix where it lies"
    rows, widths, stored = lying
    if stored not in DTYPES or any(width % MULTIPLE or not width for width in widths):
        return f"it needs float32 or bfloat16, widths of multiples of {MULTIPLE}"
    most = ROWS if stored == dtype else ROWS_OF_BFLOAT16
    return "" if 0 < rows <= most else f"it is for {most} rows at most"


def refuses_paged(
    target: Target,
    dtype: Any,
    *,
    keys: int,
    key_width: int,
    value_width: int,
    page: int = 0,
    fp8: bool = False,
    by_column: bool,
    devices: int = 1,
    **_,
) -> str:
    """Why attention over pages, or rows, cannot be the C kernel's."""
    if why := needs_c(target, dtype):
        return why
    if devices > 1 or fp8 or not by_column:
        return "it needs one device, entries in float32 or bfloat16, rows without segments"
    if key_width % MULTIPLE or value_width % MULTIPLE or (page or keys) % 4:
        return f"it needs widths of multiples of {MULTIPLE}, pages of multiples of 4"
    return ""


def needs_c(target: Target, dtype: Any) -> str:
    """Why no C kernel can run, "" where one can."""
    if target.platform != "cpu":
        return f"it needs a CPU, not {target.platform}"
    if dtype != jnp.float32:
        return f"it needs float32, not {dtype.name}"
    return "" if cpu.available() else "it needs Linux and a C compiler: gcc, or what CC names"


def product(
    x_RK: Float[Array, "R K"], w: Float[Array, "L a b"], layer: jax.typing.ArrayLike, *, across: bool
) -> Float[Array, "R N"]:
    """``x w[layer]`` of a weight (K N), or ``x w[layer]ᵀ`` of one that lies across (N K), in float32: each number is
    one sum in the order of K, whatever rows stand beside it."""
    shape = x_RK.shape[0], w.shape[1 if across else 2]
    return cpu.call("few_across" if across else "few_along", [shape], x_RK, w, jnp.int32(layer))[0]


def attend(
    q_BSHK: Float[Array, "B S H K"],
    pages: Float[Array, "L P N W"],
    layer: jax.typing.ArrayLike,
    table_BJ: Int[Array, "B J"],
    limits_BS: Int[Array, "B S"],
    scale: float,
    *,
    groups: int,
    values: int,
    first: int,
) -> Float[Array, "B S H V"]:
    """Attention over the rows' first ``limits`` tokens where they lie: group g's key is ``entry[g·K : (g+1)·K]``, its
    value ``entry[first + g·V : first + (g+1)·V]`` with V = ``values``."""
    sizes = jnp.array([groups, values, first], jnp.int32)
    seen = table_BJ.astype(jnp.int32), limits_BS.astype(jnp.int32)
    shape = (*q_BSHK.shape[:3], values)
    return cpu.call("paged", [shape], q_BSHK, pages, jnp.int32(layer), *seen, sizes, jnp.float32(scale))[0]
