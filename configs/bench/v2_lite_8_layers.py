"""The speed of training on one NVIDIA H200: V2-Lite's widths, 8 of its layers, 4 × 4096 tokens, float32 masters.

    deepseek-jax bench bench/v2_lite_8_layers --work train

Every layer is a program of its own and keeps everything for its backward pass, which takes 88 GiB. On 80 GB:
--model.num-hidden-layers 4. Figures: docs/results/h200.md. It has no data: it is there to be timed.
"""

import dataclasses

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.train.losses import LanguageModelLoss
from deepseek_jax.workflows.pretrain import PretrainConfig, PretrainData
from deepseek_jax.workflows.recipe import load_recipe


def config() -> PretrainConfig:
    return PretrainConfig(
        model=dataclasses.replace(load_recipe("models/deepseek_v2_lite", ModelConfig), num_hidden_layers=8),
        compute=ComputeConfig(dtype="bfloat16", remat="none", scan_unroll=8),
        data=PretrainData(seq_len=4096),
        batch_size=4,
        loss=LanguageModelLoss(chunk=4096),
    )
