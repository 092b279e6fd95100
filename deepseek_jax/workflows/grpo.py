"""Reinforcement learning with GRPO on problems with rule rewards, as R1-Zero does it."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from deepseek_jax.checkpoint.model import load
from deepseek_jax.data.chat import encode_prompt
from deepseek_jax.data.rows import PromptLoader
from deepseek_jax.parallel.hosts import require_one_process
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.rl.problems import read_jsonl, to_prompt
from deepseek_jax.rl.rollout import RolloutConfig, Rollouts
from deepseek_jax.train.grpo import GRPOLoss
from deepseek_jax.workflows.problems import ProblemEval, evaluate_problems
from deepseek_jax.workflows.stage import (
    RESULT,
    StageConfig,
    read_result,
    require,
    train_stage,
    write_json,
)


@dataclasses.dataclass(frozen=True)
class GRPOConfig(StageConfig):
    """A GRPO run; a step's batch is ``rollout.prompts × rollout.group`` answers.

    init_from: a run or a released model's folder. inner_epochs: updates on each batch (μ).
    """

    run_dir: str = "runs/grpo"
    init_from: str = ""
    prompts: str = ""
    rollout: RolloutConfig = RolloutConfig()
    loss: GRPOLoss = GRPOLoss()
    inner_epochs: int = 1
    problems: ProblemEval = ProblemEval()

    def __post_init__(self) -> None:
        super().__post_init__()
        for ours, theirs in (("temperature", "temperature"), ("max_length", "max_tokens")):
            if getattr(self.loss, ours) != getattr(self.rollout, theirs):
                raise ValueError(
                    f"loss.{ours}={getattr(self.loss, ours)} but rollout.{theirs}={getattr(self.rollout, theirs)}: "
                    "the learner must see the answers as they were sampled"
                )


def grpo(config: GRPOConfig) -> dict[str, Any]:
    """Run the stage, or go on with it; returns and writes its result.

    Raises NoSignalError when almost no group of answers has unequal rewards, see ``RolloutConfig``.
    """
    require_one_process("grpo")
    require(config, "init_from", "prompts")
    run_dir = Path(config.run_dir)
    start = load(config.init_from, compute=config.compute, mesh=make_mesh(config.mesh))
    longest = max(len(encode_prompt(start.text, to_prompt(p))) for p in read_jsonl(config.prompts))
    if longest > config.rollout.prompt_width:
        raise ValueError(
            f"rollout.prompt_width={config.rollout.prompt_width}, but {config.prompts} has a prompt of {longest} tokens"
        )
    loader = PromptLoader(
        config.prompts,
        batch_size=config.rollout.prompts,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    trained, facts = train_stage(
        config,
        stage="grpo",
        start=start,
        loss=config.loss,
        batches=Rollouts(start, loader, config.rollout, seed=config.seed),
        reference=config.loss.kl_weight > 0,
        updates=config.inner_epochs,
    )
    found = evaluate_problems(trained, config.problems, run_dir, stage="grpo", seed=config.seed)
    write_json(run_dir / RESULT, facts | found)
    return read_result(run_dir) or {}
