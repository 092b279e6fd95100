"""Several answers to a question as figures: pass@1, pass@k, cons@k."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np


def pass_at_1(correct: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """The mean over questions of each one's share of right samples, and its standard error.

    Questions are the sample: ``std(shares) / sqrt(questions)`` (with ``questions - 1`` in std), since answers to one
    question are no independent draws; nan for a single question.
    """
    shares = [float(np.mean(samples)) for samples in correct]
    spread = float(np.std(shares, ddof=1)) if len(shares) > 1 else math.nan
    return float(np.mean(shares)), spread / math.sqrt(len(shares))


def pass_at_k(correct: Sequence[Sequence[bool]], k: int) -> float:
    """The chance that one of k samples is right, without bias from n ≥ k samples of which c are: the mean over
    questions of ``1 - C(n - c, k) / C(n, k)`` (arXiv 2107.03374, equation 1). ValueError where n < k."""
    if not correct or min(map(len, correct)) < k:
        raise ValueError(f"pass@{k} needs {k} samples of each question")
    chances = [1 - math.comb(len(s) - sum(s), k) / math.comb(len(s), k) for s in correct]
    return float(np.mean(chances))


def cons_at_k(answers: Sequence[Sequence[Hashable | None]], correct: Sequence[Sequence[bool]], k: int) -> float:
    """The share of questions whose most frequent answer among k samples is right; the mean over each ⌊n / k⌋ times k.

    ``answers`` tell wrong ones apart (None: none was given, no vote); all right ones are one answer, as they equal the
    right one. Of equally frequent answers the one that came first counts.
    """
    shares = []
    for said, right in zip(answers, correct, strict=True):
        votes: list[tuple[bool, Hashable]] = [(ok, None if ok else one) for one, ok in zip(said, right, strict=True)]
        rounds = [votes[start : start + k] for start in range(0, len(votes) - k + 1, k)]
        shares.append(np.mean([_winner_is_right(votes) for votes in rounds]))
    return float(np.mean(shares))


def _winner_is_right(votes: Sequence[tuple[bool, Hashable]]) -> bool:
    given = Counter(vote for vote in votes if vote != (False, None))  # in the order of first votes
    return bool(given) and given.most_common(1)[0][0][0]
