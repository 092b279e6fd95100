"""R1 on one GPU with a DeepSeek-V3 of our own: the miniature's stages, a base of 30 M parameters, bfloat16.

    deepseek-jax r1 r1/own

The base is trained from nothing on the standard library's text and generated problems. One H200: 7.5 minutes. Right
answers to held-out problems, sampled: base 57 %, R1-Zero 98 %, stages 1 to 4 73, 98, 97 and 98 %, student 98 %
(docs/results/r1.md).
"""

import dataclasses
from typing import Any

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.workflows.r1 import R1Config
from deepseek_jax.workflows.recipe import load_recipe

COMPUTE = ComputeConfig(dtype="bfloat16")
# Few layers, as decoding takes some 40 kernels for each; no groups of experts, which would be five more; and widths
# that Hopper's kernels have: V3's of heads, a latent of 128, experts of 256.
BASE = ModelConfig(
    vocab_size=2048,
    hidden_size=512,
    num_hidden_layers=4,
    intermediate_size=2048,
    num_attention_heads=4,
    kv_lora_rank=128,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=12,
    num_experts_per_tok=3,
    n_group=1,
    topk_group=1,
    moe_intermediate_size=256,
    max_position_embeddings=2048,
    initializer_range=0.02,
)
ROLLOUT = {"prompts": 32, "group": 16, "patience": 0}  # few groups are left with signal, where nearly all is right
REINFORCED = {"zero": 100, "reasoning": 80, "all_scenarios": 80}  # steps
FINE_TUNED = {"cold_start": 80, "sft": 200, "student": 300}
JUDGING, SAMPLED = ("helpful", "harmless"), ("cold_start_samples", "samples")


def config() -> R1Config:
    small = load_recipe("r1/miniature", R1Config)
    reinforced = {"optimizer": {"peak_lr": 1e-4}, "rollout": ROLLOUT}
    stages = {name: larger(small, name, loop={"steps": n}, **reinforced) for name, n in REINFORCED.items()}
    tuned = {"optimizer": {"peak_lr": 5e-4}, "batch_size": 32}
    stages |= {name: larger(small, name, loop={"steps": n}, **tuned) for name, n in FINE_TUNED.items()}
    stages |= {name: larger(small, name, optimizer={"peak_lr": 3e-4}, batch_size=32) for name in JUDGING}
    stages |= {name: dataclasses.replace(getattr(small, name), compute=COMPUTE, batch_size=512) for name in SAMPLED}
    text = {"optimizer": {"peak_lr": 1e-3, "warmup_steps": 50}, "batch_size": 64}
    stages |= {name: larger(small, name, **text) for name in ("pretrain", "student_base")}
    stages["pretrain"] = with_parts(stages["pretrain"], loop={"steps": 600}, model=BASE)
    student = {"vocab_size": 1024, "hidden_size": 256, "num_hidden_layers": 6, "first_k_dense_replace": 6}
    student |= {"intermediate_size": 768, "head_dim": 64}
    stages["student_base"] = with_parts(stages["student_base"], loop={"steps": 500}, model=student)
    data = with_parts(small.data, corpus={"vocab_size": BASE.vocab_size, "max_code_bytes": 6_000_000})
    return dataclasses.replace(
        small,
        data=dataclasses.replace(data, pages=32_000, student_vocab_size=1024),
        evaluation=dataclasses.replace(small.evaluation, compute=COMPUTE, batch_size=384),
        **stages,
    )


def larger(small: R1Config, name: str, *, microbatches: int = 1, **changed: Any) -> Any:
    """The miniature's stage, in bfloat16, with these fields."""
    stage = with_parts(getattr(small, name), step={"microbatches": microbatches}, **changed)
    return dataclasses.replace(stage, compute=COMPUTE)


def with_parts(config: Any, **changed: Any) -> Any:
    """A configuration with fields changed, and fields of its parts, given as a dict."""
    parts = {
        name: dataclasses.replace(getattr(config, name), **value) if isinstance(value, dict) else value
        for name, value in changed.items()
    }
    return dataclasses.replace(config, **parts)
