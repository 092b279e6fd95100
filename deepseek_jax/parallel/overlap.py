"""What XLA is asked for so that a train step's collectives run beside its compute: the one place for it."""

# Without the scheduler gradients are added up one after another behind the backward pass (docs/results/gpus.md).
OPTIONS: dict[str, bool | int | str] = {"xla_gpu_enable_latency_hiding_scheduler": True}


def overlapping(platform: str, devices: int) -> dict[str, bool | int | str]:
    """Compiler options of a train step on so many devices: those of several GPUs alone have any."""
    return dict(OPTIONS) if devices > 1 and platform in ("gpu", "cuda") else {}
