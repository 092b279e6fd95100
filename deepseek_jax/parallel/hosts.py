"""Joining the other hosts of a run."""

import os
from collections.abc import Callable
from typing import TypeVar

import jax
from jax.experimental import multihost_utils

Found = TypeVar("Found")


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


def first_host_first(work: Callable[[], Found]) -> Found:
    """``work()`` on process 0, then on the others, which find what it left in a folder that all share."""
    if jax.process_count() == 1:
        return work()
    if jax.process_index() > 0:
        multihost_utils.sync_global_devices("first_host_first")
        return work()
    found = work()
    multihost_utils.sync_global_devices("first_host_first")
    return found


def require_one_process(stage: str) -> None:
    """Refuse a stage that samples answers on several hosts: each would ask its own questions."""
    if jax.process_count() > 1:
        raise ValueError(f"{stage} samples answers, which one process can do so far, not {jax.process_count()}")
