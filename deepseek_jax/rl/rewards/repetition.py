"""What is said over and over."""

from collections.abc import Callable, Mapping
from typing import Any

from deepseek_jax.rl.rewards.words import split_words


def repetition(n: int = 6) -> Callable[[str, Mapping[str, Any]], float]:
    """The reward for n-grams of n words: −(1 − different / all), from 0 (none comes twice) towards −1."""
    if n < 1:
        raise ValueError(f"repetition of {n} words: expected at least 1")

    def score(completion: str, row: Mapping[str, Any]) -> float:
        del row
        words = split_words(completion.casefold())
        count = len(words) - n + 1
        if count < 1:
            return 0.0
        return len(set(zip(*(words[start : start + count] for start in range(n)), strict=True))) / count - 1

    return score
