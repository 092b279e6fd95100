"""Pretraining of a 3.1 M-parameter DeepSeek-V3 on Python source and worked arithmetic.

deepseek-jax pretrain demo/pretrain

2 CPU cores: 2 to 2¾ minutes, 2.0–2.3 bits per byte on held-out code and prose.
"""

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.train.loop import LoopConfig
from deepseek_jax.train.losses import LanguageModelLoss
from deepseek_jax.train.optimizer import OptimizerConfig
from deepseek_jax.train.step import StepConfig
from deepseek_jax.workflows.pretrain import PretrainConfig, PretrainData


def config() -> PretrainConfig:
    corpus = "runs/demo/corpus"
    return PretrainConfig(
        run_dir="runs/demo/pretrain",
        model=ModelConfig(
            vocab_size=512,
            hidden_size=128,
            num_hidden_layers=4,
            intermediate_size=384,
            num_experts_per_tok=2,
            moe_intermediate_size=96,
            initializer_range=0.02,
        ),
        compute=ComputeConfig(scan_unroll=3),
        data=PretrainData(
            path=(f"{corpus}/documents/train.jsonl",),
            heldout=(f"{corpus}/documents/heldout.jsonl",),
            heldout_kinds=("code", "prose"),
            tokenizer=f"{corpus}/tokenizer.json",
            seq_len=128,
        ),
        batch_size=16,
        optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=20),
        step=StepConfig(microbatches=2, bias_update_speed=0.003),
        loss=LanguageModelLoss(chunk=64),
        loop=LoopConfig(steps=900, log_every=10, checkpoint_every=100, eval_every=300),
    )
