"""What the makers say of chips, and what was measured: one table, for estimates."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """Of one device as jax counts them: a TPU7x chip is two. Bytes and FLOPs, by the second where they are rates."""

    flops: float
    """Peak in bfloat16."""
    hbm: float
    """Bytes of memory, before what the runtime keeps."""
    bandwidth: float
    """Of that memory."""
    link: float
    """One way: of one link to a neighbour in the torus, or of a GPU's NVLink in all."""
    slow: float
    """One way, for each device: between slices (DCN), or nodes (InfiniBand)."""
    torus: int = 0
    """Dimensions of the torus; 0: every device of a node has the others as neighbours."""
    around: int = 4
    """Devices from which on a dimension of the torus closes to a ring, in multiples of this."""
    cores: int = 1
    """Devices of one chip, which share its links."""
    attained: float = 1.0
    """Share of ``flops`` that a large product reaches; 1 where nobody has measured it."""
    attained_bandwidth: float = 1.0
    """The same of ``bandwidth``."""
    experts: float = 1.0
    """Share of ``flops`` that our kernels of experts reach."""
    attention: float = 1.0
    """The same of attention's, forward and backward."""


GB, GIB, TERA = 1e9, 2.0**30, 1e12

# TPUs: cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x} for peaks, memories and the network between slices (50 Gbit/s a
# chip of v5p, 100 of v6e and TPU7x, 25 of v5e); jax-ml.github.io/scaling-book/tpus for a link's bandwidth one way (45
# GB/s of v5e, 90 of v5p and v6e); TPU7x has 1,200 GB/s both ways over six links. None was measured by this project.
# GPUs: nvidia.com/h100, nvidia.com/h200 and 400 Gbit/s of InfiniBand for each GPU. What is attained was measured on
# one H200 (docs/results/h200.md, "Where a step goes"): dense products 774 TFLOP/s, experts' 720 of rows padded to
# tiles, attention's 538, AdamW 4.2 TB/s; between two, 240 GB/s out of each in a sum or an all-to-all. The H100 is taken
# to reach the same shares.
_V5E = Chip(197 * TERA, 16 * GIB, 819 * GB, 45 * GB, 3.125 * GB, torus=2, around=16)
_V5P = Chip(459 * TERA, 95 * GIB, 2765 * GB, 90 * GB, 6.25 * GB, torus=3)
_V6E = Chip(918 * TERA, 32 * GIB, 1638 * GB, 90 * GB, 12.5 * GB, torus=2, around=16)
_TPU7X = Chip(1153.5 * TERA, 96 * GIB, 3690 * GB, 100 * GB, 6.25 * GB, torus=3, cores=2)
_H100 = Chip(989.4 * TERA, 80 * GIB, 3350 * GB, 240 * GB, 50 * GB, 0, 4, 1, 0.78, 0.87, 0.73, 0.54)
_H200 = dataclasses.replace(_H100, hbm=141 * GB, bandwidth=4800 * GB)

CHIPS = {"v5e": _V5E, "v5p": _V5P, "v6e": _V6E, "tpu7x": _TPU7X, "h100": _H100, "h200": _H200}
"""By the names in ``--topology``."""
