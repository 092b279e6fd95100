"""The one place where meshes are made and where the current mesh is known.

Entry points and threads enter a model's mesh with ``jax.set_mesh``, outside jit; only this folder asks for it.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from deepseek_jax.typed import check_least, check_types


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis. The batch is split over ``data``, ``fsdp`` and ``expert`` together."""

    data: int = 0
    """Copies of the parameters, each with its part of the batch; 0: as many as the other axes leave devices for."""
    fsdp: int = 1
    """Ways in which parameters are split by model width, and the batch."""
    expert: int = 1
    """Ways in which the routed experts are split, and the batch."""
    context: int = 1
    """Ways in which the sequence is split."""
    tensor: int = 1
    """Ways in which heads and feed-forward widths are split."""

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, 1, *(axis.name for axis in dataclasses.fields(self) if axis.name != "data"))


AXES = tuple(field.name for field in dataclasses.fields(MeshConfig))


def make_mesh(config: MeshConfig | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over ``devices`` (default: all of them), every axis Auto.

    Explicit axes, ``jax.make_mesh``'s default, break gathers, sorts and scatters. Raises ValueError when the axes'
    product is not the number of devices.
    """
    config = config or MeshConfig()
    devices = list(jax.devices() if devices is None else devices)
    sizes = dataclasses.asdict(config)
    rest = math.prod(size for name, size in sizes.items() if name != "data")
    if not sizes["data"]:
        sizes["data"] = max(1, len(devices) // rest)
    if math.prod(sizes.values()) != len(devices):
        shape = " × ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(
            f"the mesh {shape} needs {math.prod(sizes.values())} devices, but there are {len(devices)}; "
            "the axes' product must equal the number of devices (data=0 takes what the others leave)"
        )
    if len(devices) == len(jax.devices()):
        return jax.make_mesh(tuple(sizes.values()), AXES, (AxisType.Auto,) * len(AXES), devices=devices)
    return Mesh(np.array(devices).reshape(tuple(sizes.values())), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def current_mesh() -> AbstractMesh | None:
    """The mesh that ``jax.set_mesh`` has entered, inside jit too; None where there is none. It is part of jit's key."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh
