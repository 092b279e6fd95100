"""Machines that are not here: their devices, for the compiler, and what a collective takes on their links."""

import dataclasses
import importlib.metadata
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from deepseek_jax.parallel.chips import CHIPS, Chip
from deepseek_jax.parallel.compilers import CUDA, LIBTPU, found, silenced

NODE = 8  # GPUs of a node

# What XLA asks of a GPU that it compiles for; the rest is in CHIPS.
_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  memory_bandwidth: {bandwidth:.0f} device_memory_size: {memory:.0f} cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} runtime_version {{ major: 12 minor: 9 }}
device_description_str: "NVIDIA {name}"
"""
# Without a GPU nothing can be timed, and from jax 0.11 on XLA has no tiles for its products in Triton that were not.
OPTIONS = {"cuda": {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}, "tpu": {}}


@dataclasses.dataclass(frozen=True)
class Topology:
    """``v5p:8x8x16`` (chips along the torus), ``v6e:16x16x2slices`` (of 16 × 16 each), ``h100:256`` (nodes of 8)."""

    name: str
    """Of a chip in ``CHIPS``."""
    shape: tuple[int, ...]
    """Chips along each dimension of the torus; of GPUs how many there are."""
    slices: int = 1

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """Raises ValueError for another chip, or another number of dimensions than its torus has."""
        parts = re.fullmatch(r"(\w+):(\d+(?:x\d+)*?)(?:x([1-9]\d*)slices?)?", text)
        if not parts or parts[1] not in CHIPS:
            raise ValueError(
                f"topology={text!r}: expected CHIP:SHAPE with one of {', '.join(CHIPS)}, as v5p:8x8x16, "
                "v6e:16x16x2slices or h100:256"
            )
        shape = tuple(map(int, parts[2].split("x")))
        dimensions = CHIPS[parts[1]].torus or 1
        if len(shape) != dimensions or 0 in shape:
            raise ValueError(
                f"topology={text!r}: {parts[1]} has {dimensions} dimensions, as {'x'.join('4' * dimensions)}"
            )
        if not CHIPS[parts[1]].torus and (parts[3] or (shape[0] > NODE and shape[0] % NODE)):
            raise ValueError(f"topology={text!r}: up to {NODE} GPUs, or whole nodes of {NODE}, as {parts[1]}:256")
        return cls(parts[1], shape, int(parts[3] or 1))

    @property
    def chip(self) -> Chip:
        return CHIPS[self.name]

    @property
    def platform(self) -> str:
        return "tpu" if self.chip.torus else "cuda"

    def devices(self) -> list[Any]:
        """As the compiler names them; none is here. Must come before anything else of the process uses a device.

        Raises ModuleNotFoundError, with the command that installs it, where the compiler is missing, and ValueError for
        a shape that it does not know.
        """
        # What is in this machine is left alone, and so is the cache: another machine's programs cannot be read back.
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_enable_compilation_cache", False)
        try:
            with silenced():
                jax.devices()  # starts the plugins
                return list(self._tpus() if self.chip.torus else self._gpus())
        except jax.errors.JaxRuntimeError as error:
            raise ValueError(f"topology={self}: {str(error).splitlines()[0]}") from error

    def _tpus(self) -> Sequence[Any]:
        if not found("libtpu"):
            raise ModuleNotFoundError(f"compiling for TPUs needs libtpu: {_pip(LIBTPU)} '{_pinned('jax', 'libtpu')}'")
        options = {"num_slices": self.slices} if self.slices > 1 else {}
        name = f"{self.name}:{'x'.join(map(str, self.shape))}"
        return topologies.get_topology_desc(name, "tpu", **options).devices

    def _gpus(self) -> Sequence[Any]:
        if not any(found(f"jax_plugins.xla_cuda{version}") for version in (12, 13)):
            version = jax.__version__
            raise ModuleNotFoundError(
                f"compiling for GPUs needs jax's CUDA plugin: {_pip(CUDA)} "
                f"jax-cuda12-plugin=={version} jax-cuda12-pjrt=={version} nvidia-cuda-nvcc-cu12"
            )
        count = self.shape[0]
        nodes, inside = (1, count) if count <= NODE else (count // NODE, NODE)
        chip = self.chip
        about = _GPU.format(bandwidth=chip.bandwidth, memory=chip.hbm, name=self.name.upper())
        return topologies.get_topology_desc(
            platform="cuda", target_config=about, topology=f"1x{nodes}x{inside}"
        ).devices

    def __str__(self) -> str:
        return f"{self.name}:{'x'.join(map(str, self.shape))}" + (f"x{self.slices}slices" if self.slices > 1 else "")


def _pip(folder: Path) -> str:
    return f"{sys.executable} -m pip install --no-deps --target {folder}"


def _pinned(package: str, wanted: str) -> str:
    lines = importlib.metadata.requires(package) or ()
    return next((line.split(";")[0].strip() for line in lines if line.startswith(wanted)), wanted)


class Links:
    """What lies between the devices of a mesh, by their places in it."""

    def __init__(self, topology: Topology, mesh: Mesh):
        self.topology, self.mesh = topology, mesh
        devices, torus = list(mesh.devices.flat), topology.chip.torus
        island = "slice_index" if torus else "process_index"
        self.islands = np.array([getattr(device, island, 0) or 0 for device in devices])
        coordinates = [device.coords[:torus] if torus else () for device in devices]
        self.chips = np.array(coordinates, int).reshape(len(devices), torus)

    def axes(self, groups: Sequence[Sequence[int]]) -> tuple[str, ...]:
        """The mesh axes along which the devices of a group differ."""
        places = np.array(np.unravel_index(np.array(groups[:64]), self.mesh.devices.shape))  # axes, groups, members
        varies = (places != places[:, :, :1]).any(axis=(1, 2))
        return tuple(name for name, differs in zip(self.mesh.axis_names, varies, strict=True) if differs)

    def crosses(self, groups: Sequence[Sequence[int]]) -> bool:
        """Whether some group spans slices or nodes."""
        islands = self.islands[np.array(groups)]
        return bool((islands != islands[:, :1]).any())

    def seconds(self, kind: str, size: int, groups: Sequence[Sequence[int]]) -> float:
        """Of one collective (``hlo.Collective``'s kind and bytes): the parts between islands and within one, added.

        Each at its links' full rate: in a torus over the rings and lines that a group spans, an all-to-all by the
        bytes over the busiest of them. Within an island its own links carry the group alone.
        """
        if kind == "collective-permute":
            return max(self._passed(size, pair) for pair in _some(groups))
        return self._among(kind, size, tuple(groups[0]))

    def _passed(self, size: int, pair: Sequence[int]) -> float:
        chip, (a, b) = self.topology.chip, pair
        if self.islands[a] != self.islands[b]:
            return size / chip.slow
        sizes = np.array(self.topology.shape)
        apart = np.abs(self.chips[a] - self.chips[b])
        hops = np.where(self._closed(sizes), np.minimum(apart, sizes - apart), apart).sum() if chip.torus else 1
        return size * max(1, int(hops)) / chip.link

    def _among(self, kind: str, size: int, group: tuple[int, ...]) -> float:
        chip, members = self.topology.chip, np.array(group)
        own = members[self.islands[members] == self.islands[members[0]]]
        islands, inside = len(members) // len(own), len(own)
        twice = 2 if kind == "all-reduce" else 1
        exchanged = kind.endswith("all-to-all")
        between = size * (islands - 1) / islands / (1 if exchanged else inside) * twice / chip.slow
        if inside == 1:
            return between
        if not chip.torus:
            return between + size / (islands if exchanged else 1) * (inside - 1) / inside * twice / chip.link
        return between + self._in_torus(size / (islands if exchanged else 1) * twice, self.chips[own], exchanged)

    def _in_torus(self, size: float, chips: np.ndarray, exchanged: bool) -> float:
        chip, sizes = self.topology.chip, np.array(self.topology.shape)
        counts = np.array([len(set(column)) for column in chips.T.tolist()])
        spans = chips.max(axis=0) - chips.min(axis=0) + 1
        whole = self._closed(sizes) & (spans > sizes - sizes // np.maximum(counts, 1))
        ring, strides = np.where(whole, 2, 1), np.maximum(1, np.where(whole, sizes, spans) / counts)
        on_chip = len(chips) // math.prod(counts.tolist()) if math.prod(counts.tolist()) else 1
        places = max(1, len(chips) // max(1, on_chip))
        if places == 1:  # devices of one chip
            return size / (6 * chip.link)
        along = counts > 1
        if exchanged:
            return float((size * chip.cores * counts * strides / (4 * ring))[along].max()) / chip.link
        rate = float((ring / strides)[along].sum()) * chip.link * max(1, on_chip) / chip.cores
        return size * (places - 1) / places / rate

    def _closed(self, sizes: np.ndarray) -> np.ndarray:
        """Which dimensions of the torus are rings."""
        return sizes % self.topology.chip.around == 0


def _some(groups: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
    return groups if len(groups) <= 64 else groups[:: len(groups) // 64]
