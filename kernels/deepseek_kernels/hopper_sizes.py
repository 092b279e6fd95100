"""Sizes of the Hopper kernels that measuring decides, by chip; ``deepseek_kernels.bench --tune`` tries others.

What registers and the layout of operands decide, rows and columns of a tile for the most part, stands with the kernel.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from deepseek_kernels.target import Target

CORES = 132  # of an H100 and an H200


def refuses(target: Target, dtype: Any) -> str:
    """Why no Hopper kernel can run; "" where one can."""
    if (target.platform, target.chip) != ("cuda", "9.0"):
        return f"it needs cuda of capability 9.0, not {target.platform} {target.chip}".rstrip()
    return "" if dtype == jnp.bfloat16 else f"it needs bfloat16, not {dtype.name}"


class Sizes(NamedTuple):
    """stages: steps in shared memory at once, 0 for as many as fit. columns: of a tile. band: tiles of rows taken side
    by side, so that what they read of a matrix stays in the second-level cache. A kernel reads what it has."""

    stages: int = 0
    columns: int = 0
    band: int = 0


# An H100 and an H200 differ in their memory alone, and are one chip here.
TABLE: dict[str, dict[str, Sizes]] = {
    "9.0": {
        "grouped": Sizes(stages=4, columns=256, band=8),  # 4 · (128 + 256) · 64 · 2 bytes = 192 of 227 KiB
        "grouped_narrow": Sizes(stages=6, columns=128, band=8),  # where half of a wide row's last tile would be empty
        "few": Sizes(),
        "fp8": Sizes(band=8),
        "quantise": Sizes(stages=2),
        "gate": Sizes(stages=3),  # 72 KiB of three inputs, 32 KiB of two outputs
    }
}
HOPPER = TABLE["9.0"]
