"""R1 in miniature: every stage of the paper on a 3 M-parameter DeepSeek-V3, and a distilled Llama of 1 M.

deepseek-jax r1 r1/miniature        (make r1)
"""

from deepseek_jax.compute import ComputeConfig
from deepseek_jax.config import ModelConfig
from deepseek_jax.rl.rollout import RolloutConfig
from deepseek_jax.rl.tasks import TaskConfig
from deepseek_jax.train.grpo import GRPOLoss
from deepseek_jax.train.loop import LoopConfig
from deepseek_jax.train.losses import LanguageModelLoss
from deepseek_jax.train.optimizer import OptimizerConfig
from deepseek_jax.train.step import StepConfig
from deepseek_jax.workflows.corpus import CorpusConfig
from deepseek_jax.workflows.grpo import GRPOConfig
from deepseek_jax.workflows.pretrain import PretrainConfig, PretrainData
from deepseek_jax.workflows.r1 import R1Config
from deepseek_jax.workflows.r1_data import R1Data
from deepseek_jax.workflows.task_eval import TaskEval

RUN = "runs/r1"
DATA = f"{RUN}/data"
COMPUTE = ComputeConfig(scan_unroll=3)
PROBLEMS = TaskConfig(path=(f"{DATA}/problems_train.jsonl",))
EXAM = TaskEval(
    task=TaskConfig(path=(f"{DATA}/problems_heldout.jsonl",)), count=384, max_tokens=48, batch_size=128, by="kind"
)


def config() -> R1Config:
    return R1Config(
        data=R1Data(
            run_dir=DATA,
            corpus=CorpusConfig(vocab_size=640, arithmetic_share=0.4, max_code_bytes=300_000, sft_per_kind=1),
        ),
        pretrain=PretrainConfig(
            run_dir=f"{RUN}/pretrain",
            model=ModelConfig(
                vocab_size=640,
                hidden_size=128,
                num_hidden_layers=4,
                intermediate_size=384,
                num_experts_per_tok=2,
                moe_intermediate_size=96,
                initializer_range=0.02,
            ),
            compute=COMPUTE,
            data=PretrainData(
                path=(f"{DATA}/documents/train.jsonl",),
                heldout=(f"{DATA}/documents/heldout.jsonl",),
                heldout_kinds=("code", "prose"),
                tokenizer=f"{DATA}/tokenizer.json",
                seq_len=128,
            ),
            batch_size=16,
            optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=20),
            step=StepConfig(microbatches=2, bias_update_speed=0.003),
            loss=LanguageModelLoss(chunk=64),
            loop=LoopConfig(steps=900, log_every=10, checkpoint_every=100, eval_every=300),
        ),
        zero=reinforced("zero", "pretrain", 200, reward=("accuracy=1.0", "tags=0.2")),
    )


def reinforced(name: str, start: str, steps: int, *, reward: tuple[str, ...]) -> GRPOConfig:
    return GRPOConfig(
        run_dir=f"{RUN}/{name}",
        init_from=f"{RUN}/{start}",
        task=PROBLEMS,
        reward=reward,
        rollout=RolloutConfig(prompts=16, group=8, max_prompt=16, max_tokens=48),
        loss=GRPOLoss(chunk=32),
        compute=COMPUTE,
        optimizer=OptimizerConfig(peak_lr=3e-4, warmup_steps=5, constant_until=0.6, cosine_until=1.0, weight_decay=0.0),
        step=StepConfig(microbatches=2, bias_update_speed=0.001),
        loop=LoopConfig(steps=steps, log_every=5, checkpoint_every=50),
        evaluation=EXAM,
    )
