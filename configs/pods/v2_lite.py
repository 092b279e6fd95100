"""DeepSeek-V2-Lite (15.7 B parameters) on eight devices.

    deepseek-jax compile pods/v2_lite --topology v5p:2x2x2
    deepseek-jax compile pods/v2_lite --topology h100:8

8 × 4 rows of 4,096 tokens a step. On 8 v5p it fits, in at most 51.3 of 95.0 GiB a device; by the roofline, a bound, a
step takes 1.56 s: 83,900 tokens/s, MFU 37.5 %. On 8 H100 39.4 of 76.0 GiB, 0.83 s, 157,300 tokens/s, 32.6 %, at those
shares of peaks that an H200 reached. Compiled alone, never run there (docs/results/topologies.md).
"""

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.train.losses import LanguageModelLoss
from deepseek_jax.workflows.pretrain import PretrainConfig, PretrainData
from deepseek_jax.workflows.recipe import load_recipe


def config() -> PretrainConfig:
    return PretrainConfig(
        model=load_recipe("models/deepseek_v2_lite", ModelConfig),
        compute=ComputeConfig(dtype="bfloat16", remat="full", dispatch="all_to_all"),
        mesh=MeshConfig(fsdp=2, expert=4),
        batch_size=32,
        data=PretrainData(seq_len=4096),
        loss=LanguageModelLoss(chunk=1024),
    )
