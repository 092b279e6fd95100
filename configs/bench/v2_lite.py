"""The speed of DeepSeek-V2-Lite before the first token and after it: 15.7 B parameters, random, in bfloat16.

    deepseek-jax bench bench/v2_lite --work prefill --batch-size 8 --columns 2048
    deepseek-jax bench bench/v2_lite --work decode --batch-size 64 --columns 512
    deepseek-jax bench bench/v2_lite --work decode --batch-size 1 --columns 512

For one GPU of 80 GB, of which jax must be given nearly all: XLA_PYTHON_CLIENT_MEM_FRACTION=0.95. Figures:
docs/results/h200.md. It has no data: it is there to be timed.
"""

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.workflows.pretrain import PretrainConfig, PretrainData
from deepseek_jax.workflows.recipe import load_recipe


def config() -> PretrainConfig:
    return PretrainConfig(
        model=load_recipe("models/deepseek_v2_lite", ModelConfig),
        compute=ComputeConfig(dtype="bfloat16", scan_decode=True, scan_unroll=26),
        data=PretrainData(seq_len=2048),
        batch_size=8,
    )
