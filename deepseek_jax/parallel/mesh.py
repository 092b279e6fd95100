"""The one place where meshes are made and where the current mesh is known.

Entry points and threads enter a model's mesh with ``jax.set_mesh``, outside jit; only this folder asks for it.
"""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
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
    blocks: tuple[str, ...] = ()
    """Axes whose devices lie in blocks of a TPU's torus, as near to cubes as it allows, and not along whole dimensions:
    an all-to-all among 8 in 2 × 2 × 2 takes half the time of one around a ring. What the other axes gather and add up
    goes over fewer links then."""

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, 1, *(axis for axis in AXES if axis != "data"))
        for axis in self.blocks:
            if axis not in AXES or self.blocks.count(axis) > 1:
                raise ValueError(f"blocks={self.blocks}: expected axes, each once, of {', '.join(AXES)}")


AXES = tuple(field.name for field in dataclasses.fields(MeshConfig) if field.name != "blocks")


def make_mesh(config: MeshConfig | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over ``devices`` (default: all of them), every axis Auto, neighbours in it near each other: see
    ``arranged``.

    Explicit axes, ``jax.make_mesh``'s default, break gathers, sorts and scatters. Raises ValueError when the axes'
    product is not the number of devices.
    """
    config = config or MeshConfig()
    devices = list(jax.devices() if devices is None else devices)
    sizes = {axis: getattr(config, axis) for axis in AXES}
    rest = math.prod(size for name, size in sizes.items() if name != "data")
    if not sizes["data"]:
        sizes["data"] = max(1, len(devices) // rest)
    if math.prod(sizes.values()) != len(devices):
        shape = " × ".join(f"{name} {size}" for name, size in sizes.items() if name != "pipe" or size > 1)
        raise ValueError(
            f"the mesh {shape} needs {math.prod(sizes.values())} devices, but there are {len(devices)}; "
            "the axes' product must equal the number of devices (data=0 takes what the others leave)"
        )
    blocks = tuple(AXES.index(axis) for axis in config.blocks)
    return Mesh(arranged(tuple(sizes.values()), devices, blocks), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arranged(sizes: tuple[int, ...], devices: Sequence[Any], blocks: tuple[int, ...] = ()) -> np.ndarray:
    """The devices in an array of these sizes, which go from the links used least to those used most.

    Within a slice of TPUs axes lie along the torus; of one too large, or too small, for whole dimensions of it, several
    share one. Slices, and the nodes of GPUs, are joined by slower links: the leading axes are split over them, each by
    as large a factor as it has. Along an axis that is split so, those of one slice or node follow one another.

    blocks: places of axes that lie in blocks of the torus (``MeshConfig.blocks``).

    Raises ValueError where slices or nodes have unequally many of the devices, and for blocks where there is no torus.
    """
    groups = collections.Counter(map(_group, devices))
    if len(set(groups.values())) > 1:
        raise ValueError(f"slices or nodes with unequally many devices: {', '.join(map(str, groups.values()))}")
    rest, outer = len(groups), []
    for size in sizes:
        outer.append(math.gcd(size, rest))
        rest //= outer[-1]
    inner = [size // ways for size, ways in zip(sizes, outer, strict=True)]
    if any(inner[place] > 1 for place in blocks):
        return _within_groups(functools.partial(_in_blocks, inner, blocks), outer, devices)
    lay = functools.partial(mesh_utils.create_device_mesh, inner)
    try:
        return _within_groups(lay, outer, devices)
    except NotImplementedError:  # no whole dimensions of the torus make these sizes
        return _within_groups(functools.partial(lay, allow_split_physical_axes=True), outer, devices)


def _within_groups(lay: Callable[[list[Any]], np.ndarray], outer: list[int], devices: Sequence[Any]) -> np.ndarray:
    groups: dict[int, list[Any]] = {}
    for device in devices:
        groups.setdefault(_group(device), []).append(device)
    parts = np.empty(len(groups), object)
    parts[:] = [lay(groups[number]) for number in sorted(groups)]
    return np.block(parts.reshape(outer).tolist())


def _in_blocks(sizes: list[int], blocks: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """The devices of one torus, those along an axis of ``blocks`` in a block of it; the others' stand strides apart."""
    torus = _torus(devices)
    rest, cuts = list(torus.shape), []
    for place in blocks:
        cuts.append(_cut(rest, sizes[place]))
        rest = [size // part for size, part in zip(rest, cuts[-1], strict=True)]
    # Each dimension as (what is left, …, the second axis' part, the first's), then all that is left in front.
    ways, dimensions = len(blocks), range(torus.ndim)
    split = [size for d in dimensions for size in (rest[d], *(cut[d] for cut in reversed(cuts)))]
    order = [d * (ways + 1) for d in dimensions]
    order += [d * (ways + 1) + ways - i for i in range(ways) for d in dimensions]
    others = [size for place, size in enumerate(sizes) if place not in blocks]
    laid = torus.reshape(split).transpose(order).reshape(*others, *(sizes[place] for place in blocks))
    return np.moveaxis(laid, range(len(others), len(sizes)), blocks)


def _torus(devices: Sequence[Any]) -> np.ndarray:
    """The devices by their places: chips along each dimension, and the devices of a chip."""
    if any(device.platform != "tpu" for device in devices):
        raise ValueError(f"blocks: only TPUs lie in a torus, not {devices[0].device_kind}")
    places = np.array([(*device.coords, device.core_on_chip) for device in devices])
    places -= places.min(axis=0)
    torus = np.empty(places.max(axis=0) + 1, object)
    if torus.size != len(devices):
        raise ValueError(f"blocks: {len(devices)} devices do not fill {' × '.join(map(str, torus.shape[:-1]))} chips")
    torus[tuple(places.T)] = devices
    return torus


def _cut(shape: list[int], size: int) -> tuple[int, ...]:
    """The parts of each dimension, the last of which are a chip's devices, that make a block of ``size``: the longest
    side the shortest, then the fewest chips, then along the longest dimensions."""
    divisors = ([part for part in range(1, side + 1) if side % part == 0] for side in shape)
    found = [parts for parts in itertools.product(*divisors) if math.prod(parts) == size]
    rest = lambda parts: max(side // part for side, part in zip(shape[:-1], parts, strict=False))  # noqa: E731
    return min(found, key=lambda parts: (max(parts[:-1]), sum(parts[:-1]), rest(parts)))


def _group(device: Any) -> int:
    """Of devices with fast links between them: the slice, which jax knows of some GPUs too, else the process."""
    one = 0 if device.platform == "tpu" else device.process_index  # a topology's only slice has no number
    return getattr(device, "slice_index", one)


def current_mesh() -> AbstractMesh | None:
    """The mesh that ``jax.set_mesh`` has entered, inside jit too; None where there is none. It is part of jit's key."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh
