"""How many problems a model answers right, greedily and sampled."""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

import jax
import numpy as np

from deepseek_jax.checkpoint.model import Model
from deepseek_jax.data.chat import encode_prompt
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.rl.problems import Problem, to_prompt
from deepseek_jax.rl.rewards import accuracy_reward


@dataclasses.dataclass(frozen=True)
class Answered:
    """One problem and what the model made of it."""

    problem: Problem
    completion: str
    correct: bool


def answer(
    model: Model,
    problems: Sequence[Problem],
    *,
    max_tokens: int,
    temperature: float,
    batch_size: int,
    seed: int = 0,
) -> list[Answered]:
    """One completion per problem, judged by the accuracy reward: the answer behind ``</think>``, to the letter."""
    engine = Engine(model)
    prompts = [encode_prompt(model.text, to_prompt(problem)) for problem in problems]
    width = max(map(len, prompts))
    answered = []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        rows = part + [part[0]] * (batch_size - len(part))
        sampling = SamplingParams(temperature=temperature, max_tokens=max_tokens)
        key = jax.random.fold_in(jax.random.key(seed), start)
        out = jax.device_get(engine.generate_ids(rows, sampling, key, width=width))
        for row, problem in enumerate(problems[start : start + batch_size]):
            length = int(out.lengths_B[row]) - int(out.stopped_B[row])
            text = engine.decode(out.tokens_BN[row, :length].tolist())
            right = bool(out.stopped_B[row]) and accuracy_reward(text, problem.answer) == 1.0
            answered.append(Answered(problem, text, right))
    return answered


def accuracy(answered: Sequence[Answered]) -> tuple[float, float]:
    """Share of right answers and its standard error, ``sqrt(p (1 - p) / n)``."""
    p = float(np.mean([item.correct for item in answered]))
    return p, float(np.sqrt(p * (1 - p) / len(answered)))


def accuracy_by_kind(answered: Sequence[Answered]) -> dict[str, float]:
    kinds = defaultdict(list)
    for item in answered:
        kinds[item.problem.kind].append(item.correct)
    return {kind: float(np.mean(right)) for kind, right in kinds.items()}
