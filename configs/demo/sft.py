"""Cold start: a little SFT on ``<think>…</think>`` traces, until one answer in four is right.

deepseek-jax sft demo/sft

2 CPU cores: 7–26 seconds, 30–140 steps; then greedy 35–58 %, sampled 21–35 % (docs/results/demo.md).
"""

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.train.loop import LoopConfig
from deepseek_jax.train.losses import LanguageModelLoss
from deepseek_jax.train.optimizer import OptimizerConfig
from deepseek_jax.train.step import StepConfig
from deepseek_jax.workflows.problems import ProblemEval
from deepseek_jax.workflows.sft import SFTConfig, SFTData


def config() -> SFTConfig:
    return SFTConfig(
        run_dir="runs/demo/sft",
        init_from="runs/demo/pretrain",
        data=SFTData(path=("runs/demo/corpus/sft.jsonl",), seq_len=128),
        batch_size=8,
        compute=ComputeConfig(scan_unroll=3),
        optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=5, constant_until=1.0, cosine_until=1.0),
        step=StepConfig(bias_update_speed=0.003),
        loss=LanguageModelLoss(isolate=True, chunk=64),
        check_problems="runs/demo/corpus/problems_train.jsonl",
        check_count=256,
        problems=ProblemEval(path="runs/demo/corpus/problems_heldout.jsonl"),
        loop=LoopConfig(steps=400, log_every=10, checkpoint_every=100, eval_every=10),
    )
