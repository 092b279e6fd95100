"""Joining the other hosts of a run."""

import os

import jax


def join_hosts() -> None:
    """Connect to the other processes of a run, where ``DEEPSEEK_JAX_DISTRIBUTED=1`` says that there are some.

    On TPU pods and under Slurm jax finds coordinator, number and index of the processes by itself. Must run before
    anything touches a device.
    """
    flag = os.environ.get("DEEPSEEK_JAX_DISTRIBUTED", "0")
    if flag not in ("0", "1"):
        raise ValueError(f"DEEPSEEK_JAX_DISTRIBUTED={flag!r}: expected 0 or 1")
    if flag == "1":
        jax.distributed.initialize()
