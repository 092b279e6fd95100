"""The one place where meshes are made and where the current mesh is known.

Entry points and threads enter a model's mesh with ``jax.set_mesh``, outside jit; only this folder asks for it.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from deepseek_jax.typed import check_least, check_types


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis, the first the farthest apart. The batch is split over ``data``, ``fsdp`` and ``expert``
    together."""

    pipe: int = 1
    """Stages of a pipeline, each with its layers; their schedules are to come, so 1 so far."""
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
    """A mesh over ``devices`` (default: all of them), every axis Auto, neighbours in it near each other: see
    ``arranged``.

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
        shape = " × ".join(f"{name} {size}" for name, size in sizes.items() if name != "pipe" or size > 1)
        raise ValueError(
            f"the mesh {shape} needs {math.prod(sizes.values())} devices, but there are {len(devices)}; "
            "the axes' product must equal the number of devices (data=0 takes what the others leave)"
        )
    return Mesh(arranged(tuple(sizes.values()), devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arranged(sizes: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """The devices in an array of these sizes, which go from the links used least to those used most.

    Within a slice of TPUs axes lie along the torus; of one too large, or too small, for whole dimensions of it, several
    share one. Slices, and the nodes of GPUs, are joined by slower links: the leading axes are split over them, each by
    as large a factor as it has. Along an axis that is split so, those of one slice or node follow one another.

    Raises ValueError where slices or nodes have unequally many of the devices.
    """
    groups = collections.Counter(map(_group, devices))
    if len(set(groups.values())) > 1:
        raise ValueError(f"slices or nodes with unequally many devices: {', '.join(map(str, groups.values()))}")
    rest, outer = len(groups), []
    for size in sizes:
        outer.append(math.gcd(size, rest))
        rest //= outer[-1]
    inner = [size // ways for size, ways in zip(sizes, outer, strict=True)]
    try:
        return _within_groups(inner, outer, devices, share=False)
    except NotImplementedError:  # no whole dimensions of the torus make these sizes
        return _within_groups(inner, outer, devices, share=True)


def _within_groups(inner: list[int], outer: list[int], devices: Sequence[Any], *, share: bool) -> np.ndarray:
    groups: dict[int, list[Any]] = {}
    for device in devices:
        groups.setdefault(_group(device), []).append(device)
    lay = functools.partial(mesh_utils.create_device_mesh, inner, allow_split_physical_axes=share)
    blocks = np.empty(len(groups), object)
    blocks[:] = [lay(groups[number]) for number in sorted(groups)]
    return np.block(blocks.reshape(outer).tolist())


def _group(device: Any) -> int:
    """Of devices with fast links between them: the slice, which jax knows of some GPUs too, else the process."""
    one = 0 if device.platform == "tpu" else device.process_index  # a topology's only slice has no number
    return getattr(device, "slice_index", one)


def current_mesh() -> AbstractMesh | None:
    """The mesh that ``jax.set_mesh`` has entered, inside jit too; None where there is none. It is part of jit's key."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh
