"""What XLA is asked for so that a train step's collectives run beside its compute: the one place for it."""

from jax.sharding import Mesh

# Of several GPUs alone. Without the scheduler gradients are added up one after another behind the backward pass
# (docs/results/gpus.md).
OPTIONS: dict[str, bool | int | str] = {"xla_gpu_enable_latency_hiding_scheduler": True}

# On v5p no collective overlaps by itself: all-gathers run within fusions that they do not feed, exchanges beside
# whatever the schedule has (docs/results/topologies.md). Later chips' compilers do so unasked. Not fuse_reduce_scatter,
# which for V3's widths makes fusions that do not fit the vector memory.
_FUSED = "xla_tpu_enable_async_collective_fusion"
TPU_OPTIONS: dict[str, dict[str, bool | int | str]] = {
    "TPU v5": {
        _FUSED: True,
        f"{_FUSED}_fuse_all_gather": True,
        f"{_FUSED}_multiple_steps": True,
        "xla_tpu_overlap_compute_collective_tc": True,
        "xla_enable_async_all_gather": True,
        "xla_tpu_enable_async_all_to_all": True,
    }
}


def overlapping(mesh: Mesh) -> dict[str, bool | int | str]:
    """Compiler options of a train step on ``mesh``: of one device, other TPUs and CPUs none."""
    device = mesh.devices.flat[0]
    if mesh.size == 1:
        return {}
    return dict(OPTIONS if device.platform in ("gpu", "cuda") else TPU_OPTIONS.get(device.device_kind, {}))
