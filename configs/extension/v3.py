"""DeepSeek-V3's context from 4K to 32K to 128K (arXiv 2412.19437, section 4.3): the paper's own numbers.

    deepseek-jax pretrain extension/v3:to_32k --init-from runs/v3/pretrain
    deepseek-jax pretrain extension/v3:to_128k

YaRN is switched on at the first step of the first phase (factor 40 of 4,096 positions, beta 32 and 1, temperature 0.1
ln 40 + 1, on the rotated 64 numbers of a key alone), and stays as it is in the second. Each phase has 1,000 steps of
62.9 M tokens at the rate that pretraining ended with. Never run: they took 119,000 of the 2,788,000 H800 hours. Rows,
mesh and what a layer keeps are those of pods/v3:v5p_32k and v5p_128k, for 1,024 v5p. Not published, so chosen here: no
warm-up, and what pretraining ends with of the rest (the routing bias at rest, multi-token prediction at 0.1). Adam's
moments begin anew.
"""

import dataclasses

from deepseek_jax.train.loop import LoopConfig
from deepseek_jax.train.optimizer import OptimizerConfig
from deepseek_jax.workflows.pretrain import PretrainConfig
from deepseek_jax.workflows.recipe import load_recipe

RUN = "runs/v3"


@dataclasses.dataclass(frozen=True)
class Phases:
    to_32k: PretrainConfig
    to_128k: PretrainConfig


def config() -> Phases:
    return Phases(to_32k=phase("32k", f"{RUN}/pretrain"), to_128k=phase("128k", f"{RUN}/32k"))


def phase(name: str, start: str) -> PretrainConfig:
    pod = load_recipe(f"pods/v3:v5p_{name}", PretrainConfig)  # whose model has the scaling
    return dataclasses.replace(
        pod,
        run_dir=f"{RUN}/{name}",
        init_from=start,
        data=dataclasses.replace(pod.data, path=(f"data/{name}",)),
        optimizer=OptimizerConfig(
            peak_lr=7.3e-6, warmup_steps=0, constant_until=1.0, cosine_until=1.0, moments_dtype="bfloat16"
        ),
        step=dataclasses.replace(pod.step, bias_update_speed=0.0),
        loss=dataclasses.replace(pod.loss, mtp_weight=0.1),
        loop=LoopConfig(steps=1000, log_every=1, checkpoint_every=100),
    )
