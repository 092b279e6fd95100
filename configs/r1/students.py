"""The six released students: SFT alone on R1's 804,745 samples, at the paper's rates (arXiv 2501.12948).

    deepseek-jax sft r1/students:qwen_7b --init-from Qwen2.5-Math-7B --data.path kept.jsonl general_sft.jsonl

They start from Qwen2.5-Math-1.5B and 7B, Qwen2.5-14B and 32B, Llama-3.1-8B, which has no chat template of its own
(--chat-template FILE), and Llama-3.3-70B-Instruct. Two passes in rows of 32,768 tokens, batches of 64; the paper has
two or three. Of warm-up it says nothing: none. Never run; the number of devices is yours (--mesh.fsdp).
"""

import dataclasses

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.train.loop import LoopConfig
from deepseek_jax.train.optimizer import OptimizerConfig
from deepseek_jax.workflows.sft import SFTConfig, SFTData


def student(name: str, rate: float) -> SFTConfig:
    return SFTConfig(
        run_dir=f"runs/students/{name}",
        data=SFTData(path=("runs/r1/samples/kept.jsonl", "data/general_sft.jsonl"), seq_len=32_768, drop_long=True),
        batch_size=64,
        optimizer=OptimizerConfig(
            peak_lr=rate, warmup_steps=0, constant_until=0.0, cosine_until=1.0, end_ratio=0.1, tail_ratio=0.1
        ),
        loop=LoopConfig(steps=4200, log_every=10, checkpoint_every=200),
        compute=ComputeConfig(dtype="bfloat16", remat="full"),
    )


@dataclasses.dataclass(frozen=True)
class Students:
    qwen_1_5b: SFTConfig = student("qwen_1_5b", 1e-4)
    qwen_7b: SFTConfig = student("qwen_7b", 8e-5)
    qwen_14b: SFTConfig = student("qwen_14b", 7e-5)
    qwen_32b: SFTConfig = student("qwen_32b", 6e-5)
    llama_8b: SFTConfig = student("llama_8b", 5e-5)
    llama_70b: SFTConfig = student("llama_70b", 2e-5)


def config() -> Students:
    return Students()
