"""The length of a completion in words; that in tokens is shaped where they are known, in the rollout."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from deepseek_jax.rl.rewards.words import split_words


def length(limit: int, buffer: int) -> Callable[[str, Mapping[str, Any]], float]:
    """The reward for a limit in words, numbers included, of thought and reply together."""
    if not 1 <= buffer <= limit:
        raise ValueError(f"length of {limit} words with a buffer of {buffer}: expected 1 <= buffer <= limit")

    def score(completion: str, row: Mapping[str, Any]) -> float:
        del row
        return float(overlong(len(split_words(completion)), limit, buffer))

    return score


def overlong(counts: int | np.ndarray, limit: int, buffer: int) -> np.ndarray:
    """DAPO's soft punishment (arXiv 2503.14476, equation 13): 0 up to limit − buffer, from there in a line to −1."""
    return np.asarray(-np.clip((counts - (limit - buffer)) / buffer, 0.0, 1.0))
