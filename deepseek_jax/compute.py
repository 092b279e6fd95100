"""How a network is computed: nothing here changes what it is, so a checkpoint does not record it."""

import dataclasses
from typing import Literal

import jax
from jax.sharding import Mesh

from deepseek_jax.parallel.sharding import ShardingRules
from deepseek_jax.typed import check_types
from deepseek_kernels.registry import TABLE
from deepseek_kernels.target import Target

# Whose implementations the fields name.
OPERATIONS = {
    "attention": ("mla_attention", "gqa_attention"),
    "decode_attention": ("mla_decode",),
    "experts": ("routed_experts",),
    "grouped_matmul": ("grouped_matmul",),
}


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """What a run may change from one day to the next.

    dtype: of activations and products; sums, norms' statistics, softmax, router and losses are float32 always.
    param_dtype: of parameters at rest, for inference; a ``TrainState`` keeps float32 masters whatever it says.
      ``float8_e4m3`` keeps the FP8 matrices of a checkpoint that has them as they are.
    remat: what a layer keeps for its backward pass: with ``none`` everything, ``dots`` its products, ``full`` nothing.
    scan_unroll: layers per turn of the scan: more compile longer and run faster, on a CPU above all.
    scan_decode: scan the layers of a kind when decoding too, which compiles once for all layers and copies each one's
      weights out of their stacks at every token, but for what kernels read where it lies: on Hopper experts and cache.
    target: what kernels are chosen for, spelled as ``Target.parse`` reads it; ``auto``: the mesh's first device.
    attention, decode_attention, experts, grouped_matmul: implementations by name; ``auto``: the registry's choice.
    rules: which mesh axes split which logical axis.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16", "float8_e4m3"] = "float32"
    remat: Literal["none", "dots", "full"] = "none"
    scan_unroll: int = 1
    scan_decode: bool = False
    target: str = "auto"
    attention: str = "auto"
    decode_attention: str = "auto"
    experts: str = "auto"
    grouped_matmul: str = "auto"
    rules: ShardingRules = ShardingRules()

    def __post_init__(self) -> None:
        check_types(self)
        if self.scan_unroll < 1:
            raise ValueError(f"scan_unroll={self.scan_unroll}: must be positive")
        if self.target != "auto":
            Target.parse(self.target)
        for field, operations in OPERATIONS.items():
            names = {row.name: None for operation in operations for row in TABLE[operation]}
            if (value := getattr(self, field)) not in ("auto", *names):
                raise ValueError(f"{field}={value!r}: expected one of auto, {', '.join(names)}")

    def on(self, mesh: Mesh | None) -> "ComputeConfig":
        """The same with the target spelled out: the one given, else the first device of ``mesh`` or of this process.

        ValueError where the one given is of another platform than that device.
        """
        device = Target.of(jax.devices()[0] if mesh is None else mesh.devices.flat[0])
        if self.target == "auto":
            return dataclasses.replace(self, target=str(device))
        if self.kernels.platform != device.platform:
            raise ValueError(f"target={self.target!r}: the devices here are {device}")
        return self

    @property
    def kernels(self) -> Target:
        """What kernels are chosen for. While ``target`` is ``auto``: the device that Python finds itself before."""
        return Target.here() if self.target == "auto" else Target.parse(self.target)
