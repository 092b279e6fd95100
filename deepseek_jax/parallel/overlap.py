"""What XLA is asked for so that a train step's collectives run beside its compute: the one place for it."""

from jax.sharding import Mesh

# Of several GPUs alone. Without the scheduler gradients are added up one after another behind the backward pass
# (docs/results/gpus.md).
OPTIONS: dict[str, bool | int | str] = {"xla_gpu_enable_latency_hiding_scheduler": True}


def overlapping(mesh: Mesh) -> dict[str, bool | int | str]:
    """Compiler options of a train step on ``mesh``: of one device, TPUs and CPUs none."""
    several = mesh.size > 1 and mesh.devices.flat[0].platform in ("gpu", "cuda")
    return dict(OPTIONS) if several else {}
