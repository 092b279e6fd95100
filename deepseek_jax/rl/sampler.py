"""One step's answers: sampled by a policy, graded, and made a batch for ``GRPOLoss``."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.data.rows import PromptLoader
from deepseek_jax.files import finite
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.parallel.processes import gather, own_part
from deepseek_jax.rl.advantages import choose_groups, has_signal, levelled, settled, step_advantages, token_ends
from deepseek_jax.rl.asking import ask
from deepseek_jax.rl.conversing import converse, tool_metrics
from deepseek_jax.rl.grader import Grader
from deepseek_jax.rl.grades import Grades
from deepseek_jax.rl.rewards.length import overlong
from deepseek_jax.rl.rollout_config import RolloutConfig
from deepseek_jax.rl.samples import About, Sample, packed_rows, rollout_batch
from deepseek_jax.rl.tasks import Steps, Task, where
from deepseek_jax.train.grpo import group_advantages


@dataclasses.dataclass(frozen=True)
class Made:
    """What a step trains on.

    metrics: of all that was asked. signal: the share of its groups that had any. answers: those of the batch, as
    ``rollouts.jsonl`` has them. asked: how many there were in all. loader: where the questions have come to.
    """

    batch: dict[str, np.ndarray]
    metrics: dict[str, float]
    signal: float
    answers: list[dict[str, Any]]
    asked: int
    loader: dict[str, Any]


@dataclasses.dataclass
class _Clock:
    rollout: float = 0.0
    reward: float = 0.0


class Sampler:
    """Asks the loader's next questions, and makes a batch of what an engine answers; see ``Rollouts``."""

    def __init__(
        self,
        task: Task,
        grader: Grader,
        loader: PromptLoader,
        config: RolloutConfig,
        *,
        seed: int,
        positions: int,
        multiple: int,
        minibatches: int,
    ):
        self.task, self.grader, self.loader, self.config = task, grader, loader, config
        self.most = config.columns(positions)
        self.multiple, self.minibatches = multiple, minibatches
        self.key = jax.random.key(seed)
        self._numbers = {where(row): number for number, row in enumerate(loader.rows)}

    def make(self, engine: Engine, step: int, dispatched: Callable[[], None] = lambda: None) -> Made:
        """The batch of a step. dispatched: called when the devices have been given the first answers to sample."""
        config, clock = self.config, _Clock()
        samples, asked, grades, total_PG, signal_P = self._enough(engine, step, clock, dispatched)
        engine.free()  # the learner needs the room
        chosen = choose_groups(signal_P, config.prompts).tolist()
        metrics = grades.metrics() | _metrics(asked, clock) | {"signal_groups": float(np.mean(signal_P))}
        if config.resample:
            metrics |= {"asked": float(len(signal_P)), "signal_groups_trained": float(np.mean(signal_P[chosen]))}
        if self.task.tools is not None:
            metrics |= tool_metrics(asked)
        total_PG = levelled(total_PG, config.tolerance)
        reward_N = grades.total_N + [math.fsum(score for _, score in steps) for steps in grades.steps_N]
        if config.overlong_buffer:
            lengths = np.array([answer.answer for answer in asked])
            overlong_N = overlong(lengths, limit=config.max_tokens, buffer=config.overlong_buffer)
            metrics["reward_overlong"] = float(np.mean(overlong_N))
            metrics["reward"] += config.overlong_weight * metrics["reward_overlong"]
            reward_N = reward_N + config.overlong_weight * overlong_N
            total_PG = total_PG + config.overlong_weight * overlong_N.reshape(total_PG.shape).astype(np.float32)
        everyone = [group * config.group + i for group in chosen for i in range(config.group)]
        members, trained = own_part(everyone), self._brought(samples, everyone)
        by_token = any(grades.steps_N[i] for i in everyone)
        steps = [grades.steps_N[i] for i in members]
        advantages = self._advantages(engine, trained, total_PG[own_part(chosen)], steps if by_token else None)
        rewards = [{name: scores[i] for name, scores in grades.rewards.items()} for i in members]
        answers = [*map(self._answer, trained, rewards, reward_N[members].tolist(), advantages)]
        lengths = [asked[i].tokens for i in everyone]
        batch = self._batch(trained, advantages, engine.tokenizer.pad_id, lengths, by_token)
        return Made(batch, metrics, metrics["signal_groups"], answers, len(asked), self.loader.state())

    def _brought(self, samples: list[Sample], everyone: Sequence[int]) -> list[Sample]:
        """This process's part of the answers with these numbers among all processes'. Those of questions that another
        one has asked, as with ``resample`` it may, it is sent."""
        count, here = jax.process_count(), jax.process_index()
        asked, part = self.config.prompts * self.config.group, len(everyone) // count

        def place(number: int) -> tuple[int, int]:  # whose it is, and where among its own
            attempt, place = divmod(number, asked)
            process, place = divmod(place, asked // count)
            return process, attempt * (asked // count) + place

        places = [place(number) for number in everyone]
        moved = {k: own for k, (process, own) in enumerate(places) if process != k // part}
        if not moved:
            return [samples[own] for _, own in own_part(places)]
        mine = {k: samples[own] for k, own in moved.items() if places[k][0] == here}
        sent = gather({k: sample.to_json(self._numbers[where(sample.question.row)]) for k, sample in mine.items()})
        given = {int(k): content for contents in sent for k, content in contents.items()}
        return [
            Sample.from_json(given[k], self.loader.rows) if k in given else samples[places[k][1]]
            for k in range(here * part, (here + 1) * part)
        ]

    def _batch(
        self,
        trained: list[Sample],
        advantages: Sequence[float | np.ndarray],
        pad_id: int,
        lengths: list[int],
        by_token: bool,
    ) -> dict[str, np.ndarray]:
        """This process's part. lengths: of the answers of all."""
        packing = {"pack": self.config.pack, "multiple": self.multiple, "minibatches": self.minibatches}
        beside: dict[str, Any] = {"longest": max(lengths), "by_token": by_token}
        if self.config.pack:
            count = len(trained)
            parts = [lengths[start : start + count] for start in range(0, len(lengths), count)]
            beside["fullest"] = max(packed_rows(part, self.config.pack, self.minibatches) for part in parts)
            beside["first"] = count * jax.process_index()
        batch = rollout_batch(trained, advantages, pad_id=pad_id, most=self.most, **packing, **beside)
        same = {"temperature": self.config.temperature, "max_tokens": self.config.max_tokens}
        rows = len(batch["tokens"])
        return batch | {name: np.full((rows, 1), value, np.float32) for name, value in same.items()}

    def _enough(
        self, engine: Engine, step: int, clock: _Clock, dispatched: Callable[[], None]
    ) -> tuple[list[Sample], list[About], Grades, np.ndarray, np.ndarray]:
        """Samples of as many groups with signal as a step trains on, as far as ``resample`` allows, and of all others
        that were asked on the way. Of those of all processes: what is told of them, grades, rewards (P G), and which
        groups have signal (P)."""
        config, samples, parts, asked = self.config, list[Sample](), list[Grades](), list[About]()
        while True:
            began = time.monotonic()
            new = self._sampled(engine, step, len(parts), dispatched)
            samples += new
            sampled = time.monotonic()
            texts, rows = [sample.answer.text for sample in new], [sample.question.row for sample in new]
            ended, whole = ([getattr(sample.answer, name) for sample in new] for name in ("ended", "all_turns"))
            parts.append(self._everyones(self.grader.grade(texts, rows, ended=ended, whole=whole), new, asked))
            clock.rollout += sampled - began
            clock.reward += time.monotonic() - sampled
            grades, groups = Grades.joined(parts), (-1, config.group)
            total_PG = settled(grades.total_N.reshape(groups), grades.failed_N.reshape(groups)).astype(np.float32)
            steps_PG = [grades.steps_N[i : i + config.group] for i in range(0, len(asked), config.group)]
            signal_P = has_signal(total_PG, steps_PG, config.tolerance)
            if np.sum(signal_P) >= config.prompts or len(parts) > config.resample:
                return samples, asked, grades, total_PG, signal_P

    def _everyones(self, grades: Grades, samples: list[Sample], asked: list[About]) -> Grades:
        """The grades of all processes' answers, each of which has graded its own; what there is to tell of those goes
        behind ``asked``."""
        about = [About.of(sample) for sample in samples]
        if jax.process_count() == 1:
            asked += about
            return grades
        told = gather({"grades": grades.to_json(), "answers": [dataclasses.asdict(answer) for answer in about]})
        asked += [About(**answer) for process in told for answer in process["answers"]]
        return Grades.joined([Grades.from_json(process["grades"]) for process in told])

    def _sampled(self, engine: Engine, step: int, attempt: int, dispatched: Callable[[], None]) -> list[Sample]:
        """A group of answers to each of the loader's next questions."""
        config, tokenizer = self.config, engine.tokenizer
        asked = [ask(self.task, tokenizer, row) for row in next(self.loader)]
        questions = [question for question in asked for _ in range(config.group)]
        sampling = SamplingParams(temperature=config.temperature, max_tokens=config.max_tokens)
        # Keys of no step's first attempt.
        key = self.key if not attempt else jax.random.fold_in(self.key, np.uint32(2**32 - attempt))
        return converse(
            engine,
            self.task.tools,
            questions,
            sampling,
            jax.random.fold_in(key, step),
            experts=config.replay_routing,
            dispatched=dispatched,
        )

    def _advantages(
        self, engine: Engine, samples: list[Sample], total_PG: np.ndarray, steps: list[Steps] | None
    ) -> Sequence[float | np.ndarray]:
        """Of each answer; where some have ``steps``, of its tokens: the answer's and its steps' together."""
        scale, group = self.config.advantage, self.config.group
        whole_N = np.asarray(group_advantages(jnp.asarray(total_PG), scale=scale)).ravel()
        if steps is None:
            return whole_N.tolist()
        ends = []
        for sample, own in zip(samples, steps, strict=True):
            begin = sample.last_turn  # whose text it is that was graded
            found = token_ends(engine.tokenizer, sample.ids[begin:].tolist(), sample.start, sample.answer.text, own)
            ends.append([(begin + end, reward) for end, reward in found])
        lengths, made = [len(sample.ids) for sample in samples], list[np.ndarray]()
        for first in range(0, len(samples), group):
            some = slice(first, first + group)
            made += step_advantages(ends[some], lengths[some], scale=scale, tolerance=self.config.tolerance)
        return [whole + own for whole, own in zip(whole_N, made, strict=True)]

    def _answer(
        self, sample: Sample, rewards: dict[str, Any], reward: float, advantage: float | np.ndarray
    ) -> dict[str, Any]:
        question, right = sample.question, None
        with contextlib.suppress(ValueError):  # a task whose rewards need none
            right = self.task.right(question.row)
        return finite(
            {
                "question": self._numbers[where(question.row)],
                "prompt": question.text,
                "answer": right,
                "completion": sample.answer.all_turns,
                "tokens": sample.length,
                "ended": sample.answer.ended,
                "rewards": {name: float(value) for name, value in rewards.items()},
                "reward": float(reward),
                "advantage": float(np.mean(advantage)),
            }
        )


def _metrics(asked: Sequence[About], clock: _Clock) -> dict[str, float]:
    """Metrics of answers whatever they are worth, and of what they took."""
    lengths = [answer.own for answer in asked]
    return {
        "response_length": float(np.mean(lengths)),
        "response_waits": float(np.mean([answer.waits for answer in asked])),
        "truncated": 1 - float(np.mean([answer.ended for answer in asked])),
        "rollout_seconds": clock.rollout,
        "reward_seconds": clock.reward,
        "rollout_tokens_per_second": sum(lengths) / clock.rollout,
    }
