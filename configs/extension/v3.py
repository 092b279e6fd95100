"""DeepSeek-V3's context from 4K to 32K to 128K (arXiv 2412.19437, section 4.3): the paper's own numbers.

    deepseek-jax pretrain extension/v3:to_32k --init-from runs/v3/pretrain
    deepseek-jax pretrain extension/v3:to_128k

YaRN is switched on at the first step of the first phase (factor 40 of 4,096 positions, beta 32 and 1, temperature 0.1
ln 40 + 1, on the rotated 64 numbers of a key alone), and stays as it is in the second. Each phase has 1,000 steps of
62.9 M tokens at the rate that pretraining ended with. Never run: they took 119,000 of the 2,788,000 H800 hours; the
mesh is of 512 devices. Not published, so chosen here: no warm-up, and what pretraining ends with of the rest (the
routing bias at rest, multi-token prediction at 0.1). Adam's moments begin anew.
"""

import dataclasses

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.train.loop import LoopConfig
from deepseek_jax.train.losses import LanguageModelLoss
from deepseek_jax.train.optimizer import OptimizerConfig
from deepseek_jax.train.step import StepConfig
from deepseek_jax.workflows.pretrain import PretrainConfig, PretrainData
from deepseek_jax.workflows.recipe import load_recipe

RUN = "runs/v3"


@dataclasses.dataclass(frozen=True)
class Phases:
    to_32k: PretrainConfig
    to_128k: PretrainConfig


def config() -> Phases:
    return Phases(
        to_32k=phase("32k", f"{RUN}/pretrain", seq_len=32_768, batch_size=1920),
        to_128k=phase("128k", f"{RUN}/32k", seq_len=131_072, batch_size=480),
    )


def phase(name: str, start: str, *, seq_len: int, batch_size: int) -> PretrainConfig:
    return PretrainConfig(
        run_dir=f"{RUN}/{name}",
        init_from=start,
        model=load_recipe("models/deepseek_v3", ModelConfig),  # which has the scaling
        data=PretrainData(path=(f"data/{name}",), seq_len=seq_len),
        batch_size=batch_size,
        optimizer=OptimizerConfig(
            peak_lr=7.3e-6, warmup_steps=0, constant_until=1.0, cosine_until=1.0, moments_dtype="bfloat16"
        ),
        step=StepConfig(bias_update_speed=0.0),
        loss=LanguageModelLoss(mtp_weight=0.1),
        loop=LoopConfig(steps=1000, log_every=1, checkpoint_every=100),
        compute=ComputeConfig(dtype="bfloat16", remat="full"),
        mesh=MeshConfig(fsdp=16, expert=32),
    )
