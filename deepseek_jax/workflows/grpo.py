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
from deepseek_jax.train.reference import Reference
from deepseek_jax.train.scoring import Scorer
from deepseek_jax.workflows.problems import ProblemEval, evaluate_problems
from deepseek_jax.workflows.stage import (
    RESULT,
    StageConfig,
    read_result,
    train_stage,
    write_json,
)


@dataclasses.dataclass(frozen=True)
class GRPOConfig(StageConfig):
    """A GRPO run from the stage in ``init_from``; a step's batch is ``rollout.prompts × rollout.group`` answers.

    minibatches, inner_epochs: a batch is split into so many parts with an update each, and gone through so often (μ).
    The learning rate counts updates. reference_every: with a ``loss.kl_weight``, the reference becomes the policy every
    so many steps (0: never).
    """

    run_dir: str = "runs/demo/grpo"
    init_from: str = "runs/demo/sft"
    prompts: str = "runs/demo/corpus/problems_train.jsonl"
    rollout: RolloutConfig = RolloutConfig()
    loss: GRPOLoss = GRPOLoss()
    minibatches: int = 1
    inner_epochs: int = 1
    reference_every: int = 0
    problems: ProblemEval = ProblemEval()

    MAY_CHANGE = (*StageConfig.MAY_CHANGE, "problems")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference_every and not self.loss.kl_weight:
            raise ValueError(f"reference_every={self.reference_every}: without loss.kl_weight there is no reference")


def grpo(config: GRPOConfig) -> dict[str, Any]:
    """Run the stage, or go on with it; returns and writes its result.

    Raises NoSignalError when almost no group of answers has unequal rewards, see ``RolloutConfig``.
    """
    require_one_process("grpo")
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
    reference = None
    if config.loss.kl_weight:
        reference = Reference(start.params, start.router_bias, path=config.init_from, every=config.reference_every)
    scorer = Scorer(
        start.config,
        start.compute,
        chunk=config.loss.chunk,
        microbatches=config.step.microbatches,
        old=config.inner_epochs * config.minibatches > 1,
        reference=reference,
    )
    trained, facts = train_stage(
        config,
        stage="grpo",
        start=start,
        loss=config.loss,
        batches=Rollouts(start, loader, config.rollout, seed=config.seed),
        prepare=scorer,
        reference=reference,
        epochs=config.inner_epochs,
        minibatches=config.minibatches,
    )
    found = evaluate_problems(trained, config.problems, run_dir, stage="grpo", seed=config.seed)
    write_json(run_dir / RESULT, facts | found)
    return read_result(run_dir) or {}
