"""What a program is compiled for: kernels are chosen by this, never by the machine that happens to trace."""

import dataclasses
import math
import typing
from typing import Any, Literal

import jax

Platform = Literal["cpu", "cuda", "rocm", "tpu"]


@dataclasses.dataclass(frozen=True)
class Target:
    """platform; chip: the compute capability of an NVIDIA GPU ("9.0"), the kind of a TPU ("TPU v5p"), "" of a CPU;
    cores: processors of one device that a kernel may spread over, 0 where that does not matter.

    >>> Target.parse("cuda:9.0:132")
    Target(platform='cuda', chip='9.0', cores=132)
    """

    platform: Platform = "cpu"
    chip: str = ""
    cores: int = 0

    @classmethod
    def of(cls, device: Any) -> "Target":
        """The target that a device is, one of a topology too."""
        if device.platform == "cpu":
            return cls("cpu")
        if device.platform == "tpu":
            return cls("tpu", device.device_kind)
        vendor: Platform = "rocm" if "rocm" in getattr(device.client, "platform_version", "") else "cuda"
        return cls(vendor, str(device.compute_capability), int(device.core_count))

    @classmethod
    def parse(cls, text: str) -> "Target":
        """``PLATFORM[:CHIP[:CORES]]``, as ``str`` writes it. ValueError for another platform or number."""
        platform, chip, cores, *more = [*text.split(":"), "", ""]
        if platform not in typing.get_args(Platform) or any(more) or not (cores or "0").isdecimal():
            allowed = ", ".join(typing.get_args(Platform))
            raise ValueError(f"target={text!r}: expected PLATFORM[:CHIP[:CORES]] with one of {allowed}, or auto")
        return cls(typing.cast(Platform, platform), chip, int(cores or 0))

    def __str__(self) -> str:
        return ":".join([self.platform, self.chip, str(self.cores)]).removesuffix(":0").rstrip(":")

    @classmethod
    def here(cls) -> "Target":
        """The first device of the current mesh, or else of this process: what a function is for that is told nothing.

        Raises:
          ValueError: inside jit, under a mesh of devices that are not this process's: their target must be named.
        """
        mesh, own = jax.sharding.get_abstract_mesh(), jax.devices()[0]
        kind = None if mesh.empty else mesh.abstract_device
        if kind is None or kind.device_kind == own.device_kind:
            return cls.of(own)
        try:
            return cls.of(jax.sharding.get_mesh().devices.flat[0])
        except ValueError:  # a trace knows the mesh's shape and kind of device alone
            raise ValueError(f"target=None inside jit, under a mesh of {kind.device_kind}: name the target") from None


def devices() -> int:
    """That operands may be split over here: the current mesh's, one inside a shard_map over all its axes."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(size for name, size in mesh.shape.items() if name not in mesh.manual_axes)
