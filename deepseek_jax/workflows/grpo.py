"""Reinforcement learning with GRPO on the questions of any task with rule rewards, as R1-Zero does it."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import tyro

from deepseek_jax.config import ModelConfig
from deepseek_jax.data.text import read_rows
from deepseek_jax.data.turns import count_turns
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.rl.grader import Grader
from deepseek_jax.rl.rollout import Rollouts
from deepseek_jax.rl.rollout_config import RolloutConfig, open_questions
from deepseek_jax.rl.sample_log import SampleLog
from deepseek_jax.rl.tasks import Task, TaskConfig, make_task
from deepseek_jax.saying import say
from deepseek_jax.train.grpo import GRPOLoss
from deepseek_jax.train.ppo import CriticConfig
from deepseek_jax.train.reference import Reference
from deepseek_jax.train.scoring import Scorer
from deepseek_jax.workflows.own_run import open_start, owns_run, with_chat_template, with_turns
from deepseek_jax.workflows.stage import train_stage
from deepseek_jax.workflows.stage_config import StageConfig
from deepseek_jax.workflows.stage_result import finish
from deepseek_jax.workflows.task_eval import Exam, TaskEval, open_exam


@dataclasses.dataclass(frozen=True)
class GRPOConfig(StageConfig):
    """A GRPO run on the rows of ``task.path``; a step's batch is ``rollout.prompts × rollout.group`` answers."""

    run_dir: str = "runs/grpo"
    init_from: str = ""
    """The model to start from: a run, or a released model's folder."""
    ignore_config: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A field of a released model's config.json to take as absent; give it several times for more."""
    chat_template: str = ""
    """Another chat template than the model's own: r1_zero, which a base model is asked by, or a file of jinja2 text.
    The run keeps it beside its tokenizer, and what starts from the run has it."""
    task: TaskConfig = TaskConfig()
    reward: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME[:ARGUMENT...][=WEIGHT]; model:RUN[:always][=WEIGHT], a reward model's score of rows that the task does not
    grade (or of all); or file.py:function[=WEIGHT], of (completion, row) -> number or None. Give it several times for
    more. By default the task's own."""
    rollout: RolloutConfig = RolloutConfig()
    loss: GRPOLoss = GRPOLoss()
    minibatches: int = 1
    """Parts of a batch with an update each; the learning rate counts updates."""
    inner_epochs: int = 1
    """How often a batch is gone through (μ)."""
    reference_every: int = 0
    """With a loss.kl_weight, the reference becomes the policy every so many steps (0: never)."""
    evaluation: TaskEval = TaskEval()
    """Questions to ask at each loop.eval_every and at the end; with task.tools, unless evaluation.task.tools names
    others."""

    MAY_CHANGE = (*StageConfig.MAY_CHANGE, "ignore_config", "evaluation")
    STAGE = "grpo"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference_every and not self.has_reference:
            raise ValueError(f"reference_every={self.reference_every}: without loss.kl_weight there is no reference")
        if self.rollout.advantage == "return" and self.make_critic() is None:
            raise ValueError(
                "rollout.advantage='return': without a critic (deepseek-jax ppo has one) that is REINFORCE without a "
                "baseline; expected 'std', 'none' or 'leave_one_out'"
            )
        if self.rollout.staleness and not self.loss.tis_cap:
            raise ValueError(
                f"rollout.staleness={self.rollout.staleness}: answers of an older policy must be weighted by how "
                "likely they are now: expected a loss.tis_cap of 2, say"
            )

    @property
    def has_reference(self) -> bool:
        return self.loss.kl_weight > 0

    @property
    def keeps_old(self) -> bool:
        """Whether the policy's log-probabilities before a batch's updates are needed."""
        return self.inner_epochs * self.minibatches > 1

    def make_critic(self) -> CriticConfig | None:
        return None

    def rows_of_step(self) -> tuple[int, str]:
        prompts, group, packed = self.rollout.prompts, self.rollout.group, self.rollout.pack > 0
        return 0 if packed else prompts * group, f"rollout.prompts={prompts}, rollout.group={group}"

    def columns_of_step(self, model: ModelConfig) -> int | None:
        return self.rollout.columns(model.max_position_embeddings)

    def _check_parts(self) -> None:
        super()._check_parts()
        if self.minibatches > (answers := self.rollout.prompts * self.rollout.group):
            said = self.rows_of_step()[1]
            raise ValueError(f"minibatches={self.minibatches}: more than the {answers} answers of {said}")


@owns_run("init_from", "task.path")
def grpo(config: GRPOConfig) -> dict[str, Any]:
    """Run the stage, or go on with it; returns and writes its result.

    Raises NoSignalError when almost no group of answers has unequal rewards, see ``RolloutConfig``.
    """
    _check_processes(config)
    task, exam = make_task(config.task), open_exam(_with_tools(config), seed=config.seed)
    models = {"compute": config.compute, "mesh": make_mesh(config.mesh)}
    with Grader(config.reward or task.rewards, task=task, time_limit=config.rollout.reward_seconds, **models) as grader:
        say(f"rewards: {', '.join(config.reward or task.rewards)}")
        rows = list(read_rows(config.task.path))  # what is wrong with them is known before a model is read
        task.check(rows)
        grader.check(rows)
        turns = {count_turns(task.messages(row)) for row in rows}
        return _train(config, task, grader, exam, turns)


def _check_processes(config: GRPOConfig) -> None:
    """ValueError naming what several processes cannot share out."""
    count, prompts = jax.process_count(), config.rollout.prompts
    if rest := prompts % count:
        nearest = " or ".join(str(some) for some in (prompts - rest, prompts - rest + count) if some)
        raise ValueError(
            f"rollout.prompts={prompts} are not to be shared out to {count} processes; the nearest is {nearest}"
        )


def _with_tools(config: GRPOConfig) -> TaskEval:
    """The evaluation as it is asked: what has learnt to call tools is asked with them."""
    asked = config.evaluation.task
    tools = asked.tools if asked.tools.use else config.task.tools
    return dataclasses.replace(config.evaluation, task=dataclasses.replace(asked, tools=tools))


def _train(config: GRPOConfig, task: Task, grader: Grader, exam: Exam | None, turns: set[int]) -> dict[str, Any]:
    if config.loop.eval_every and exam is None:
        raise ValueError(f"loop.eval_every={config.loop.eval_every}: nothing to evaluate without evaluation.task.path")
    start = with_chat_template(config, open_start(config, arrays=config.has_reference))
    start = with_turns(config, start, turns)
    loader = open_questions(
        task,
        start,
        config.task.path,
        config.rollout,
        batch_size=config.rollout.prompts,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    reference = None
    if config.has_reference:
        reference = Reference(start.params, start.router_bias, path=config.init_from, every=config.reference_every)
    scorer = Scorer(
        start.config,
        start.compute,
        chunk=config.loss.chunk,
        microbatches=config.step.microbatches,
        old=config.keeps_old,
        reference=reference,
    )
    ways = math.prod(start.mesh.shape[axis] for axis in start.compute.rules.batch)
    rollouts = Rollouts(
        start,
        task,
        grader,
        loader,
        config.rollout,
        seed=config.seed,
        multiple=config.step.microbatches * ways // jax.process_count(),
        minibatches=config.minibatches,
        log=SampleLog(config.run_dir, config.loop),
        steps=config.loop.steps,
    )
    trained, facts = train_stage(
        config,
        stage=config.STAGE,
        start=start,
        loss=config.loss,
        batches=rollouts,
        prepare=scorer,
        reference=reference,
        epochs=config.inner_epochs,
        minibatches=config.minibatches,
        critic=config.make_critic(),
        evaluate=exam.metrics if exam and config.loop.eval_every else None,
        on_done=rollouts.trained,
    )
    return finish(config, facts, lambda: exam.result(trained, Path(config.run_dir), stage=config.STAGE) if exam else {})
