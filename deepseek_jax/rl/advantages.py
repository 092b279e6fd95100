"""From rewards to advantages: what a grader gave, step by step or as a whole, against the answers of the same group."""

from collections.abc import Sequence

import numpy as np

from deepseek_jax.data.streaming import TextStream
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.rl.tasks import Steps
from deepseek_jax.train.grpo import Scale


def settled(total_PG: np.ndarray, failed_PG: np.ndarray) -> np.ndarray:
    """Rewards in which an answer whose grading failed has the mean of its group's others, so that it teaches nothing:
    a grader that breaks must be worth neither less nor more than the others. 0 where all of a group failed."""
    counted_PG = np.where(failed_PG, 0.0, total_PG)
    mean_P1 = counted_PG.sum(axis=1, keepdims=True) / np.maximum((~failed_PG).sum(axis=1, keepdims=True), 1)
    return np.where(failed_PG, mean_P1, total_PG)


def has_signal(total_PG: np.ndarray, steps_PG: Sequence[Sequence[Steps]], tolerance: float) -> np.ndarray:
    """Of each group, whether the rewards of its answers, or those of their steps, lie further apart than that."""
    rewards_P = [[reward for steps in group for _, reward in steps] for group in steps_PG]
    apart_P = [len(rewards) > 1 and np.ptp(rewards) > tolerance for rewards in rewards_P]
    return (np.ptp(total_PG, axis=1) > tolerance) | np.array(apart_P, bool)


def levelled(total_PG: np.ndarray, tolerance: float) -> np.ndarray:
    """Rewards of which those of a group that lie no further apart than that are equal: noise teaches nothing."""
    return np.where(np.ptp(total_PG, axis=1, keepdims=True) > tolerance, total_PG, total_PG[:, :1])


def choose_groups(signal_P: np.ndarray, count: int) -> np.ndarray:
    """The first ``count`` groups with signal, or all of them and the first without; in their order."""
    return np.sort(np.argsort(~signal_P, kind="stable")[:count])


def step_advantages(
    steps_G: Sequence[Steps], lengths_G: Sequence[int], *, scale: Scale, tolerance: float = 1e-6
) -> list[np.ndarray]:
    """Process supervision (DeepSeekMath 4.1.3): of each answer's tokens, ``A_t = Σ r̃`` over its steps that end at t or
    later, with ``r̃ = (r - mean) / std`` over all steps of all answers of the group, or ``r`` for "return".

    Args:
      steps_G: the token in which each step ends, -1 for one before the first, and its reward.
      scale: as ``group_advantages`` has it. ValueError for "leave_one_out", which is of answers.
      tolerance: rewards no further apart are equal, and no signal.
    """
    if scale == "leave_one_out":
        raise ValueError('rollout.advantage="leave_one_out" compares whole answers, but a reward gives steps')
    made = [np.zeros(length) for length in lengths_G]
    rewards = np.array([reward for steps in steps_G for _, reward in steps])
    if not len(rewards) or (np.ptp(rewards) <= tolerance and scale != "return"):
        return made
    mean = 0.0 if scale == "return" else rewards.mean()
    unit = rewards.std() if scale == "std" else 1.0
    for advantage, steps in zip(made, steps_G, strict=True):
        for end, reward in steps:
            advantage[: end + 1] += (reward - mean) / unit
    return made


def token_ends(tokenizer: Tokenizer, ids: Sequence[int], start: str, text: str, steps: Steps) -> Steps:
    """Steps that end at a character of ``text``, as such that end in a token of the answer ``ids``.

    text: ``start``, which stood in the prompt, and what the ids say but for the one that ended it: that belongs to a
    step that ends where the text does. -1: the step ends in ``start``.
    """
    stream, seen, reach = TextStream(tokenizer), len(start), []
    for token in ids:
        seen += len(stream.push(token))
        reach.append(seen)

    def token_of(end: int) -> int:
        if end >= len(text):
            return len(ids) - 1
        return -1 if end <= len(start) else min(int(np.searchsorted(reach, end)), len(ids) - 1)

    return [(token_of(end), reward) for end, reward in steps]
