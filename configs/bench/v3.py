"""The speed of DeepSeek-V3's widths on eight GPUs of 80 GB: one dense layer and two of 256 experts, 25.4 B parameters.

    deepseek-jax bench bench/v3 --work train
    deepseek-jax bench bench/v3 --work decode --batch-size 256 --columns 512 --model.num-hidden-layers 16

A device has an eighth of the experts, to which tokens come, and of all that a train step keeps: float32 masters and
bfloat16 moments, 38 GB. Decoding keeps attention and the dense layer whole on each, in bfloat16. Jax must be given
nearly all memory: XLA_PYTHON_CLIENT_MEM_FRACTION=0.93. Not run on GPUs yet; predictions stand in docs/results/gpus.md.
It has no data: it is there to be timed.
"""

import dataclasses

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.parallel.sharding import ShardingRules
from deepseek_jax.train.losses import LanguageModelLoss
from deepseek_jax.train.optimizer import OptimizerConfig
from deepseek_jax.workflows.pretrain import PretrainConfig, PretrainData
from deepseek_jax.workflows.recipe import load_recipe


def config() -> PretrainConfig:
    return PretrainConfig(
        model=dataclasses.replace(
            load_recipe("models/deepseek_v3", ModelConfig),
            num_hidden_layers=3,
            first_k_dense_replace=1,
            num_nextn_predict_layers=0,
        ),
        compute=ComputeConfig(
            dtype="bfloat16",
            scan_unroll=16,
            scan_decode=True,
            rules=ShardingRules(experts=("fsdp",), expert_embed=()),
        ),
        mesh=MeshConfig(fsdp=8),
        data=PretrainData(seq_len=4096),
        batch_size=8,
        loss=LanguageModelLoss(chunk=4096),
        optimizer=OptimizerConfig(moments_dtype="bfloat16"),
    )
