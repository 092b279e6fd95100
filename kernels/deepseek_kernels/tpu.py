"""What the TPU kernels need to know of a chip: one table of block sizes that compile within its vector memory.

Chosen by estimate and by what libtpu compiles (kernels/README.md): nothing here has run on a TPU.
"""

import dataclasses

from deepseek_kernels.target import Target

LANES = 128  # of a vector register, what blocks are multiples of


@dataclasses.dataclass(frozen=True)
class Chip:
    """attention: rows and columns of a block of scores, and how many columns are multiplied at once. rows: of a grouped
    product's tile, at most; matrix: of its part of a group's matrix the longest side and the numbers, at most, and dw:
    the same of a weight gradient's. keys: of a block in decoding. cores: that share one device, each with a part of a
    grid."""

    attention: tuple[int, int]
    rows: int
    matrix: tuple[int, int]
    dw: tuple[int, int]
    keys: int
    cores: int = 1


_V5E = Chip(attention=(1024, 512), rows=512, matrix=(1408, 1408 * 1024), dw=(1408, 1024 * 768), keys=1024)
# Half the rows: of V3's 32 experts, with 3,072 rows each, tiles in which two meet are 8 % and not 16 % of all, and
# reading matrices for each tile still takes less time than multiplying.
_V5P = dataclasses.replace(_V5E, rows=256, cores=2)
_V6E = dataclasses.replace(_V5E, matrix=(2048, 2048 * 1408), dw=(1408, 1408 * 1024), keys=2048)

# By the kinds that jax and libtpu call a device.
CHIPS = {
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "TPU7x": _V6E,
}


def refuses(target: Target, dtype: object) -> str:
    """Why no kernel of ours runs there; "" where they can."""
    if target.platform != "tpu":
        return f"it needs tpu, not {target.platform}"
    if target.chip not in CHIPS:
        return f"it needs one of {', '.join(CHIPS)}, not {target.chip or 'a TPU without a name'}"
    if str(dtype) != "bfloat16":
        return f"it needs bfloat16, not {dtype}"
    return ""


def even(size: int, largest: int, parts: int = 1) -> int:
    """The block, ``largest`` at most and a multiple of ``LANES``, by which blocks of some multiple of ``parts`` cover
    ``size`` with the least beyond it. Only what would be fewer blocks than that is less than half of ``largest``."""
    if size <= parts * (largest // 2):
        return -(-size // (parts * LANES)) * LANES
    covered = lambda block: -(-size // (block * parts)) * block * parts  # noqa: E731
    return min(range(largest // LANES * LANES, largest // 2 - 1, -LANES), key=covered)


def matrix_tile(terms: int, columns: int, largest: tuple[int, int], parts: int = 1) -> tuple[int, int]:
    """Of a matrix; the number of tiles across is a multiple of ``parts``."""
    side, numbers = largest
    across = even(columns, side, parts)
    return even(terms, min(side, numbers // across)), across


def row_tile(rows: int, groups: int, largest: int) -> int:
    """A quarter of a mean group, as a power of two: what groups that do not end with a tile cost is a quarter more. No
    less than ``LANES``: narrower tiles save nothing where reading the matrices bounds the product."""
    mean = max(1, rows // groups // 4)
    return min(largest, max(LANES, 1 << (mean.bit_length() - 1)))
