"""DeepSeek-V3 (671 B parameters and a module that predicts one token more) on pods and clusters that nobody here has.

    deepseek-jax compile pods/v3:v5p --topology v5p:8x8x16

On 1,024 v5p it fits, 91.3 of 95.0 GiB; by the roofline, a bound, a step takes 77 s, MFU 46.3 %. A field for each
machine; what compilers say of them, and which were not compiled yet, stands in docs/results/topologies.md.

15,360 rows of 4,096 tokens a step as in the paper (section 4.2), or near it; after it 1,000 steps each at 32K (1,920
rows) and 128K (480 rows; section 4.3), which go on from a checkpoint: such rows are split over ``context``.
"""

import dataclasses
from typing import Any

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.parallel.sharding import ShardingRules
from deepseek_jax.train.losses import LanguageModelLoss
from deepseek_jax.train.step import StepConfig
from deepseek_jax.workflows.pretrain import PretrainConfig, PretrainData
from deepseek_jax.workflows.recipe import load_recipe


@dataclasses.dataclass(frozen=True)
class Pods:
    v5p: PretrainConfig
    """1,024 chips: --topology v5p:8x8x16. Experts in groups of 32, V3's own, in blocks of 2 × 2 × 2."""
    v5p_32k: PretrainConfig
    """64.1 of 95.0 GiB, 157 s a step, MFU 39.8 %."""
    v5p_128k: PretrainConfig
    """65.4 of 95.0 GiB, 453 s a step, MFU 35.6 %. (In microbatches of three rows of a device 133.5 GiB.)"""
    tpu7x: PretrainConfig
    """128 chips, two devices each: --topology tpu7x:4x4x8. 90.3 of 96.0 GiB, 18.1 s a step, MFU 19.7 %."""
    tpu7x_32k: PretrainConfig
    """94.7 of 96.0 GiB, 28.4 s a step, MFU 23.3 %."""
    tpu7x_128k: PretrainConfig
    """Refused, 110.7 GiB of 94.8: too few chips for keys and values of such rows beside the parameters."""
    v6e: PretrainConfig
    """Serving on 256 chips: --topology v6e:16x16 --work decode, or prefill. Decoding 1,024 rows of 4,096 takes 24.6 of
    32.0 GiB, 41.9 ms a token of each. Training is refused: 12 bytes a parameter are 29.8 GiB, gradients aside."""
    v6e_4_slices: PretrainConfig
    """Training on 1,024 chips: --topology v6e:16x16x4slices. 31.0 of 31.2 GiB, 25 to 29 s a step, MFU 7.6 to 8.9 %."""
    gpus_256: PretrainConfig
    """--topology h100:256 or h200:256. Experts over 8 nodes, to which a token goes at most once each. 59.9 of 76.0 GiB,
    334 s a step, MFU 18.6 %."""
    gpus_2048: PretrainConfig
    """--topology h100:2048 or h200:2048. 57.3 of 76.0 GiB, 37.6 s a step, MFU 22.1 %."""


def config() -> Pods:
    blocks: dict[str, Any] = {"expert": 8, "blocks": ("expert",)}
    v5p = on(MeshConfig(fsdp=128, **blocks), rows=16_384, microbatches=2, dispatch_capacity=1.25)
    tpu7x = on(MeshConfig(fsdp=32, expert=8), rows=1_024, microbatches=4, dispatch_capacity=1.25)
    # Dense parameters are split over the experts' devices too: a node's gather each part between nodes but once.
    rules = ShardingRules(embed=("fsdp", "expert"), latent=("expert",))
    nodes: dict[str, Any] = {"dispatch_nodes": 8, "dispatch_capacity": 1.25, "rules": rules}
    return Pods(
        v5p=v5p,
        v5p_32k=longer(v5p, MeshConfig(fsdp=16, context=8, **blocks), 32_768, rows=1_920, microbatches=5),
        v5p_128k=longer(v5p, MeshConfig(fsdp=4, context=32, **blocks), 131_072, rows=480, microbatches=15),
        tpu7x=tpu7x,
        tpu7x_32k=longer(tpu7x, MeshConfig(fsdp=4, expert=8, context=8), 32_768, rows=128, microbatches=4),
        tpu7x_128k=longer(tpu7x, MeshConfig(expert=8, context=32), 131_072, rows=32, microbatches=4),
        v6e=dataclasses.replace(on(MeshConfig(expert=32, tensor=8), rows=1_024), data=PretrainData(seq_len=4096)),
        # A row of 4,096 for two devices, since with one for each 4.7 GiB are too much; and dense parameters split 1,024
        # ways, since with 64 ways 1.5 are.
        v6e_4_slices=longer(
            on(MeshConfig(), rows=2_048, dispatch_capacity=1.25),
            MeshConfig(fsdp=32, expert=16, context=2),
            4096,
            rows=2_048,
            microbatches=4,
            dense=("expert",),
        ),
        gpus_256=on(MeshConfig(fsdp=4, expert=64), rows=15_360, microbatches=60, **nodes),
        gpus_2048=on(MeshConfig(data=2, fsdp=16, expert=64), rows=16_384, microbatches=2, **nodes),
    )


def on(mesh: MeshConfig, *, rows: int, microbatches: int = 1, **compute) -> PretrainConfig:
    return PretrainConfig(
        model=load_recipe("models/deepseek_v3", ModelConfig),
        compute=ComputeConfig(dtype="bfloat16", remat="full", dispatch="all_to_all", **compute),
        mesh=mesh,
        batch_size=rows,
        step=StepConfig(microbatches=microbatches),
        data=PretrainData(seq_len=4096),
        loss=LanguageModelLoss(chunk=1024),
    )


def longer(
    recipe: PretrainConfig,
    mesh: MeshConfig,
    columns: int,
    *,
    rows: int,
    microbatches: int,
    dense: tuple[str, ...] = (),
) -> PretrainConfig:
    """Parameters are split over the devices of a row as well; other than experts' over those of ``dense`` too."""
    split = ("fsdp", "context")
    rules = ShardingRules(embed=(*split, *dense), latent=split, expert_embed=split)
    return dataclasses.replace(
        recipe,
        compute=dataclasses.replace(recipe.compute, rules=rules),
        mesh=mesh,
        batch_size=rows,
        step=StepConfig(microbatches=microbatches),
        data=PretrainData(seq_len=columns),
    )
