"""How a network is computed: nothing here changes what it is, so a checkpoint does not record it."""

import dataclasses
from typing import Literal

import jax
from jax.sharding import Mesh

from deepseek_jax.parallel.sharding import ShardingRules
from deepseek_jax.typed import check_least, check_types
from deepseek_kernels.registry import TABLE
from deepseek_kernels.target import Target

# Whose implementations the fields name.
OPERATIONS = {
    "attention": ("mla_attention", "gqa_attention"),
    "decode_attention": ("mla_decode",),
    "experts": ("routed_experts",),
    "grouped_matmul": ("grouped_matmul",),
    "fp8_matmul": ("fp8_matmul",),
}


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """What a run may change from one day to the next."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations and products; sums, norms' statistics, softmax, router and losses are float32 always."""
    param_dtype: Literal["float32", "bfloat16", "float8_e4m3", "int8", "int4"] = "float32"
    """Of parameters at rest, for inference; training keeps float32 masters. float8_e4m3 keeps the FP8 matrices of a
    checkpoint that has them as they are; int8 and int4 quantise matrices as they are read, in groups of 128, the rest
    is bfloat16. A folder whose matrices are integers keeps them with any but float8_e4m3."""
    remat: Literal["none", "dots", "kernels", "full"] = "none"
    """What a layer keeps for its backward pass: all (none), what the kernels of attention and experts gave (kernels),
    that and its products (dots), or nothing (full)."""
    scan_unroll: int = 1
    """Layers per turn of the scan: more compile longer and run faster, on a CPU above all."""
    scan_decode: bool = False
    """Scan the layers of a kind when decoding too: compiles once for all of them, and copies each one's weights out of
    their stacks at every token, but for what a kernel reads where it lies: on Hopper nearly all weights and the cache.
    With scan_unroll as many layers as that are a turn of the loop; the prompt's pass is scanned one by one."""
    target: str = "auto"
    """What kernels are chosen for: PLATFORM[:CHIP[:CORES]]; auto: the mesh's first device."""
    attention: str = "auto"
    """Of attention over whole rows, an implementation by name; auto: the registry's choice."""
    decode_attention: str = "auto"
    """Of attention over the latent cache."""
    experts: str = "auto"
    """Of the routed experts."""
    grouped_matmul: str = "auto"
    """Of the products of tokens sorted by expert; hopper_fp8 rounds the tokens to FP8 as well, for FP8 weights."""
    fp8_matmul: str = "auto"
    """Of the other products with FP8 weights; hopper_fp8 as above."""
    dispatch: Literal["gather", "all_to_all", "puts"] = "gather"
    """How tokens come to experts on other devices: every token to all devices of the group (gather), or a copy to each
    device with any of its experts, in a buffer of fixed size (all_to_all); puts: the same by a kernel that gathers rows
    and stores them in the other's memory, for Hopper GPUs of one process."""
    dispatch_capacity: float = 1.5
    """all_to_all, puts: room for so many times the copies that a device gets from another on average; what finds none
    is dropped, and counted in the metrics ``dropped`` and ``dropped_sum``."""
    dispatch_nodes: int = 1
    """all_to_all: nodes that the group spans; above 1 a token goes to each node at most once, and on from there."""
    rules: ShardingRules = ShardingRules()
    """Which mesh axes split which logical axis."""

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, 1, "scan_unroll", "dispatch_nodes")
        if not self.dispatch_capacity > 0:
            raise ValueError(f"dispatch_capacity={self.dispatch_capacity}: must be above 0")
        if self.dispatch_nodes > 1 and self.dispatch != "all_to_all":
            raise ValueError(f"dispatch_nodes={self.dispatch_nodes}: dispatch={self.dispatch!r} has no hops")
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
    def exact(self) -> "ComputeConfig":
        """With tokens gathered by the devices of their experts, where nothing is learnt: what is measured depends on no
        other's tokens, so none may be dropped, and with room for all a copy for each device is no less."""
        return dataclasses.replace(self, dispatch="gather", dispatch_nodes=1)

    @property
    def kernels(self) -> Target:
        """What kernels are chosen for. While ``target`` is ``auto``: the device that Python finds itself before."""
        return Target.here() if self.target == "auto" else Target.parse(self.target)
