"""Rejection sampling as a stage: many answers of a model, of which the right and readable ones become chats to learn.

RUN/TASK-….jsonl   every answer, as it came; a run that was cut off goes on, and asks no answer twice
RUN/kept.jsonl     {"messages": [..., {"role": "assistant", ...}], "question": number, "sample": number}, as sft reads
RUN/result.json    how many were kept, and why the others were not
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from deepseek_jax.checkpoint.finding import described
from deepseek_jax.checkpoint.model import load
from deepseek_jax.compute import ComputeConfig
from deepseek_jax.files import read_json_object, write_whole
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh
from deepseek_jax.parallel.processes import first_host_alone, gather, own_part
from deepseek_jax.rl.grader import Grader
from deepseek_jax.rl.rejection import Readable, Sampled, choose, counts
from deepseek_jax.rl.reward_spec import parse_reward
from deepseek_jax.rl.rewards.language import language
from deepseek_jax.rl.tasks import TaskConfig, where
from deepseek_jax.saying import doing, say
from deepseek_jax.train.resume import differences
from deepseek_jax.typed import check_least, check_types
from deepseek_jax.workflows.own_run import owns_run
from deepseek_jax.workflows.questions import Answers, Asking, all_turns, asked_how, claim
from deepseek_jax.workflows.recipe import as_now
from deepseek_jax.workflows.stage_result import RESULT, read_result, write_json

KEPT = "kept.jsonl"


@dataclasses.dataclass(frozen=True)
class RejectionConfig:
    """Which questions are put to which model, and which answers are kept."""

    run_dir: str = "runs/rejection"
    """The folder for answers, what is kept of them, and the result. A run that is there goes on."""
    seed: int = 0
    """Added to asking.seed."""
    init_from: str = ""
    """The model that answers: a run, or a released model's folder."""
    ignore_config: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A field of a released model's config.json to take as absent; give it several times for more."""
    chat_template: str = ""
    """Another chat template than the model's own: r1_zero, which a base model is asked by, or a file of jinja2 text."""
    task: TaskConfig = TaskConfig()
    asking: Asking = Asking(temperature=1.0, top_p=1.0)
    keep: Readable = Readable()
    unanswered: bool = False
    """Ask rows without a right answer too; all that is said to them is kept where it reads well, or what ``judge``
    scores high enough."""
    judge: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Rewards, as grpo takes them, of answers to rows without a right one; give it several times for more. An answer on
    which one fails, as a reward model on one that is too long for it, is not kept."""
    judge_least: float = 0.5
    """The least sum of the judge's rewards, weighted, with which an answer is kept; scores may be negative, and so may
    this."""
    batch_size: int = 64
    """Answers at a time."""
    mesh: MeshConfig = MeshConfig()
    compute: ComputeConfig = ComputeConfig()
    quiet: bool = False
    """Say nothing before the result."""

    # What may differ where a result stands. With another keep or judge, it is chosen from the same answers anew.
    MAY_CHANGE = ("run_dir", "compute", "mesh", "batch_size", "ignore_config", "quiet")

    def __post_init__(self) -> None:
        check_types(self, signed=("judge_least",))
        check_least(self, 1, "batch_size")
        if self.judge and not self.unanswered:
            raise ValueError(f"judge={self.judge!r}: it is for rows without a right answer, which take unanswered")


@owns_run("init_from", "task.path")
def rejection(config: RejectionConfig) -> dict[str, Any]:
    """Ask what has not been answered, choose what is kept, and return and write the result.

    ValueError for rows that cannot be asked, and for a folder with answers of another model or by other settings.
    """
    run_dir = Path(config.run_dir)
    for reward in config.judge:  # known before a model is read
        parse_reward(reward)
    asking = dataclasses.replace(config.asking, seed=config.asking.seed + config.seed)
    answers = Answers(config.task, asking, unanswered=config.unanswered)
    _check_languages(answers, config.keep)
    settings = {"stage": "rejection", "answers": answers.file, "recipe": dataclasses.asdict(config)}
    there, stands = as_now(read_json_object(run_dir / "config.json"), settings, config), read_result(run_dir)
    may = tuple(f"recipe.{name}" for name in config.MAY_CHANGE)
    if stands is not None and all(name.startswith(may) for name in differences(there, settings)):
        say(f"{run_dir / RESULT} stands; remove it to choose again")
        return stands
    lines = _asked(config, answers, asking)
    first_host_alone(lambda: _begin(run_dir, settings))
    sampled = _sampled(config, answers, lines)
    first_host_alone(lambda: _choose(config, answers, lines, sampled))
    return read_result(run_dir) or {}


def _begin(run_dir: Path, settings: dict[str, Any]) -> None:
    (run_dir / RESULT).unlink(missing_ok=True)
    write_json(run_dir / "config.json", settings)


def _choose(
    config: RejectionConfig, answers: Answers, lines: Sequence[dict[str, Any]], sampled: Sequence[Sampled]
) -> None:
    """Write what is kept of the answers, and the result."""
    run_dir = Path(config.run_dir)
    chosen = choose(sampled, config.keep, least=config.judge_least if config.judge else None)
    kept = [(line, reply) for line, (reply, _) in zip(lines, chosen, strict=True) if reply is not None]
    write_whole(run_dir / KEPT, "".join(_chat(answers, line, reply) for line, reply in kept))
    skipped = {"skipped": answers.skipped} if config.asking.skip_unusable else {}
    write_json(run_dir / RESULT, counts(sampled, chosen) | skipped)
    if not kept:
        say(f"{run_dir / KEPT} is empty: no answer was kept")


def check_kept(run_dir: str | Path) -> None:
    """ValueError where none of a run's answers was kept: beside other chats, that would go unseen."""
    if not (path := Path(run_dir) / KEPT).stat().st_size:
        raise ValueError(f"{path} is empty: none of the teacher's answers was kept")


def _chat(answers: Answers, line: dict[str, Any], reply: str) -> str:
    messages = [*answers.task.messages(answers.rows[line["question"]]), *line.get("turns", ())]
    chat = {"messages": [*messages, {"role": "assistant", "content": reply}]}
    return json.dumps(chat | {name: line[name] for name in ("question", "sample")}, ensure_ascii=False) + "\n"


def _check_languages(answers: Answers, keep: Readable) -> None:
    for row in answers.rows if keep.language else ():
        try:
            language(keep.language)("", row)
        except ValueError as error:
            raise ValueError(f"{where(row)}: {error}") from error


def _asked(config: RejectionConfig, answers: Answers, asking: Asking) -> list[dict[str, Any]]:
    """All answers; the model is given back before a judge takes its place."""
    with doing(f"reading {described(config.init_from)}"):
        options: dict[str, Any] = {"compute": config.compute, "mesh": make_mesh(config.mesh)}
        model = load(config.init_from, **options, ignore_config=config.ignore_config).asked_by(config.chat_template)
    claim(Path(config.run_dir), asked_how(model, asking), "run_dir")
    return answers.complete(asking.engine(model, config.batch_size), Path(config.run_dir), config.batch_size)


def _sampled(config: RejectionConfig, answers: Answers, lines: Sequence[dict[str, Any]]) -> list[Sampled]:
    rows = [answers.rows[line["question"]] for line in lines]
    prompts = [json.dumps(answers.task.messages(row), ensure_ascii=False) for row in answers.rows]
    open_ones = [index for index, line in enumerate(lines) if line["correct"] is None]
    scores: dict[int, float | None] = {}
    if config.judge and open_ones:
        devices: dict[str, Any] = {"compute": config.compute, "mesh": make_mesh(config.mesh)}
        judge = Grader(config.judge, task=answers.task, **devices)
        with doing(f"judging {len(open_ones):,} answers"), judge as grader:
            for start in range(0, len(open_ones), config.batch_size):
                everyones = open_ones[start : start + config.batch_size]
                own = own_part(everyones)
                part = own or everyones[:1]  # where there are fewer than processes, which a reward model's scores take
                texts, ended = ([lines[index][name] for index in part] for name in ("completion", "ended"))
                whole = [all_turns(lines[index]) for index in part]
                grades = grader.grade(texts, [rows[index] for index in part], ended=ended, whole=whole)
                silent_N = np.all([np.isnan(scores_N) for scores_N in grades.rewards.values()], axis=0)
                silent_N |= grades.failed_N
                totals = zip(grades.total_N.tolist(), silent_N, strict=True)
                found = [None if silent else total for total, silent in totals][: len(own)]
                told = [score for process in gather(found) for score in process]
                scores |= dict(zip(everyones, told, strict=True))
    return [
        Sampled(
            prompts[line["question"]],
            line["completion"],
            line["tokens"],
            line["ended"],
            line["correct"],
            scores.get(index),
            row,
        )
        for index, (line, row) in enumerate(zip(lines, rows, strict=True))
    ]
