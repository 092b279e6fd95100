"""Block sizes of the Hopper kernels, as ``python -m deepseek_kernels.bench --tune`` found them: one table, by chip.

Rows and columns of a tile that a warp group's registers and the layout of the operands fix stand beside their kernel.
"""

from typing import NamedTuple

CORES = 132  # of an H100 and an H200


class Sizes(NamedTuple):
    """columns: of a tile. stages: steps in shared memory at once, 0 for as many as fit. band: tiles of rows taken side
    by side, so that what they read of a matrix stays in the second-level cache."""

    columns: int = 0
    stages: int = 0
    band: int = 0


# An H100 and an H200 differ in their memory alone, and are one chip here.
TABLE: dict[str, dict[str, Sizes]] = {
    "9.0": {
        "grouped": Sizes(columns=256, stages=4, band=8),  # 4 · (128 + 256) · 64 · 2 bytes = 192 of 227 KiB
        "few": Sizes(columns=128),
        "fp8": Sizes(band=8),
        "gate": Sizes(columns=64, stages=3),  # 72 KiB of three inputs, 32 KiB of two outputs
    }
}
HOPPER = TABLE["9.0"]
