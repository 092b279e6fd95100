"""Test-time scaling: accuracy against tokens of thinking, answers to vote, answers to choose the best from."""

import dataclasses
import hashlib
import importlib.util
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.checkpoint.model import Model
from deepseek_jax.evals.budget import Reply, Thought, Words, conclude, think
from deepseek_jax.evals.samples import best_shares, cons_shares, mean_and_error
from deepseek_jax.files import read_json_lines, write_json
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.parallel.processes import first_host_alone, gather, meet, own_part
from deepseek_jax.rl.asking import ask
from deepseek_jax.rl.grader import Grader
from deepseek_jax.rl.reward_spec import parse_reward
from deepseek_jax.rl.tasks import score_all
from deepseek_jax.typed import check_types
from deepseek_jax.workflows.questions import Answers, all_turns, powers

logger = logging.getLogger(__name__)

FILE = "scaling.json"


@dataclasses.dataclass(frozen=True)
class Scaling:
    """What accuracy is drawn against; nothing by default."""

    budgets: tuple[int, ...] = ()
    """Tokens of thinking: a thought is cut there and the answer asked for."""
    waits: tuple[int, ...] = (0,)
    """How often, at most, a thought that ends before its budget is sent on with "Wait"; a curve for each."""
    answer_tokens: int = 1024
    """Of the answer that follows a thought."""
    majority: bool = False
    """Majority votes of 1, 2, 4, … of the samples."""
    best_of: str = ""
    """A reward, named as in --reward (of a reward model, model:PATH:always): of 1, 2, 4, … samples the one that it
    ranks highest."""
    words: Words = Words()

    def __post_init__(self) -> None:
        check_types(self)
        if min((*self.budgets, self.answer_tokens)) < 1:
            raise ValueError(f"Scaling.budgets={self.budgets}, answer_tokens={self.answer_tokens}: must be at least 1")
        if self.best_of:
            parse_reward(self.best_of)

    @property
    def wanted(self) -> bool:
        return bool(self.budgets or self.majority or self.best_of)


class Thoughts(Answers):
    """Each question thought about once a sample, for the longest budget, and answered within each, in a file of its
    own.

    It goes on where it was cut off, as ``Answers`` does.
    """

    def __init__(self, answers: Answers, scaling: Scaling, waits: int):
        """answers: whose rows have been read and checked. ValueError where the task has tools."""
        if answers.task.tools is not None:
            raise ValueError("scaling.budgets: a thought with tools cannot be cut; leave task.tools empty")
        self.name, self.asking, self.task, self.rows = answers.name, answers.asking, answers.task, answers.rows
        self.scaling, self.waits = scaling, waits
        self.budgets = sorted(set(scaling.budgets))
        settings = json.dumps([self.budgets, waits, scaling.answer_tokens, dataclasses.asdict(scaling.words)])
        digest = hashlib.sha256(settings.encode()).hexdigest()[:8]
        self.file = f"{Path(answers.file).stem}-thoughts-{digest}.jsonl"

    def _ask(self, engine: Engine, part: Sequence[tuple[int, int]], batch_size: int) -> Iterator[dict[str, Any]]:
        questions = [ask(self.task, engine.tokenizer, self.rows[row]) for row, _ in part]
        prompts = [question.prompt for question in questions]
        sampling = [self._drawn(key, self.budgets[-1], 0) for key in part]
        thoughts = think(engine, prompts, sampling, waits=self.waits, words=self.scaling.words)
        replies = self._replies(engine, thoughts, part, batch_size)
        for number, ((row, sample), question, thought) in enumerate(zip(part, questions, thoughts, strict=True)):
            own = [replies[number, len(thought.within(budget)[0])] for budget in self.budgets]
            texts = [reply.thought + reply.text if reply.ended else "" for reply in own]
            scores = score_all(self.task.accuracy, texts, [question.row] * len(own))
            answers = [
                {
                    "budget": budget,
                    "completion": reply.text,
                    "tokens": reply.tokens,
                    "ended": reply.ended,
                    "correct": reply.ended and score == 1.0,
                }
                for budget, reply, score in zip(self.budgets, own, scores, strict=True)
            ]
            yield {
                **self._about(row, sample, question),
                "thought": engine.decode(thought.ids),
                "tokens": len(thought.ids),
                "ended": thought.ended,
                "answers": answers,
            }

    def _replies(
        self, engine: Engine, thoughts: Sequence[Thought], part: Sequence[tuple[int, int]], batch_size: int
    ) -> dict[tuple[int, int], Reply]:
        """By thought and the number of its tokens that a budget leaves: budgets that leave the same have one."""
        wanted = {
            (number, len(thought.within(budget)[0])): budget
            for number, thought in enumerate(thoughts)
            for budget in self.budgets
        }
        keys, found = list(wanted), {}
        for start in range(0, max(gather(len(keys))), batch_size):  # all processes ask as often
            some = keys[start : start + batch_size]
            sampling = [self._drawn(part[number], self.scaling.answer_tokens, 1 + length) for number, length in some]
            own, budgets = [thoughts[number] for number, _ in some], [wanted[key] for key in some]
            replies = conclude(engine, own, budgets, sampling, words=self.scaling.words)
            found.update(zip(some, replies, strict=True))
        return found

    def _drawn(self, key: tuple[int, int], most: int, number: int) -> SamplingParams:
        asking = self.asking
        return SamplingParams(asking.temperature, asking.top_p, max_tokens=most, seed=self.seed(*key, number))

    def curve(self, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
        points, tokens = [], []
        for place, budget in enumerate(self.budgets):
            points.append(self._shares([line["answers"][place]["correct"] for line in lines]))
            tokens.append(sum(min(line["tokens"], budget) for line in lines) / len(lines))
        label = f"Wait, {self.waits} times at most" if self.waits else "cut"
        return _curve(self.name, "budget", self.budgets, points) | {"label": label, "tokens": tokens}

    def _shares(self, correct: Sequence[bool]) -> list[float]:
        samples = self.asking.samples
        return [sum(correct[start : start + samples]) / samples for start in range(0, len(correct), samples)]


def scale(
    model: Model, tasks: Sequence[Answers], scaling: Scaling, folder: Path, *, batch_size: int
) -> list[dict[str, Any]]:
    """The curves of tasks that have been asked, which `folder`'s ``scaling.json`` and ``scaling.png`` then hold, each
    {"task", "kind": "budget" | "majority" | "best_of", "questions", "x", "accuracy", "stderr"}: how many there were,
    tokens or samples, the mean over questions and its standard error. One of budgets has "label" and "tokens" too, the
    mean tokens that were thought."""
    engine, curves = Engine(model), []
    meet()  # the first process has written them
    for answers in tasks:
        samples = answers.asking.samples
        known = [line for line in read_json_lines(folder / answers.file) if line["sample"] < samples]
        lines = sorted(known, key=lambda line: (line["question"], line["sample"]))
        groups = [lines[start : start + samples] for start in range(0, len(lines), samples)]
        correct = [[line["correct"] for line in group] for group in groups]
        if scaling.majority and answers.task.said is None:
            logger.warning("%s: no majority votes, as its answers cannot be compared", answers.name)
        elif scaling.majority:
            said = [[line["said"] for line in group] for group in groups]
            points = [cons_shares(said, correct, k) for k in powers(samples)]
            curves.append(_curve(answers.name, "majority", powers(samples), points))
        if scaling.best_of:
            scores = _scores(model, answers, scaling.best_of, lines)
            grouped = [scores[start : start + samples] for start in range(0, len(scores), samples)]
            points = [best_shares(grouped, correct, k) for k in powers(samples)]
            curves.append(_curve(answers.name, "best_of", powers(samples), points) | {"label": scaling.best_of})
        for waits in dict.fromkeys(scaling.waits) if scaling.budgets else ():
            thoughts = Thoughts(answers, scaling, waits)
            curves.append(thoughts.curve(thoughts.complete(engine, folder, batch_size)))
    first_host_alone(lambda: _write(curves, folder))
    return curves


def _write(curves: Sequence[dict[str, Any]], folder: Path) -> None:
    write_json(folder / FILE, {"curves": curves})
    draw(curves, folder / "scaling.png")


def _curve(task: str, kind: str, x: Sequence[int], shares: Sequence[Sequence[float]]) -> dict[str, Any]:
    points = [mean_and_error(each) for each in shares]
    found = {"accuracy": [mean for mean, _ in points], "stderr": [error for _, error in points]}
    return {"task": task, "kind": kind, "questions": len(shares[0]), "x": [*x]} | found


def _scores(model: Model, answers: Answers, reward: str, lines: Sequence[dict[str, Any]]) -> list[float]:
    """A reward model's on the devices of the model, and computed as it is. Several processes grade a part each."""
    own = own_part(lines)
    part = own or lines[:1]  # where there are fewer than processes, as in rejection
    with Grader((reward,), task=answers.task, compute=model.compute, mesh=model.mesh) as grader:
        texts, ended = ([line[name] for line in part] for name in ("completion", "ended"))
        rows, whole = [answers.rows[line["question"]] for line in part], [all_turns(line) for line in part]
        grades = grader.grade(texts, rows, ended=ended, whole=whole)
    ((name, own_scores),) = grades.rewards.items()
    scores = [score for process in gather(own_scores.tolist()[: len(own)]) for score in process]
    if np.isnan(scores).all():
        hint = f"; {reward}:always judges rows with a right answer too" if reward.startswith("model:") else ""
        raise ValueError(f"scaling.best_of={reward!r}: {name} has no score for any answer of {answers.name}{hint}")
    return scores


_AXES = {
    "budget": "tokens of thinking at most",
    "majority": "samples that vote",
    "best_of": "samples to choose the best from",
}


def draw(curves: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel for each kind of curve; without matplotlib nothing, which is said."""
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning("no %s: it takes matplotlib (pip install matplotlib); %s has the numbers", path, FILE)
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = [kind for kind in _AXES if any(curve["kind"] == kind for curve in curves)]
    figure = Figure(figsize=(4.2 * max(len(kinds), 1), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for place, kind in enumerate(kinds, start=1):
        axes = figure.add_subplot(1, len(kinds), place)
        for curve in curves:
            if curve["kind"] == kind:
                label = ", ".join(Path(name).name for name in (curve["task"], curve.get("label")) if name)
                y, error = ([100 * (v or 0) for v in curve[name]] for name in ("accuracy", "stderr"))
                error = [value if value == value else 0 for value in error]  # NaN for a single question
                axes.errorbar(curve["x"], y, yerr=error, marker="o", capsize=3, label=label)
        axes.set_xscale("log", base=2)
        ticks = sorted({x for curve in curves if curve["kind"] == kind for x in curve["x"]})
        axes.set_xticks(ticks, [f"{x:,}" for x in ticks])
        axes.minorticks_off()
        axes.set_xlabel(_AXES[kind])
        axes.set_ylabel("right answers, %")
        axes.set_ylim(0, 1.35 * max(axes.get_ylim()[1], 1e-3))  # with room for the legend
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small").set_in_layout(False)  # a long name takes no room from the axes
    figure.savefig(path, dpi=150)
