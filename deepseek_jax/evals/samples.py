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
    return mean_and_error([float(np.mean(samples)) for samples in correct])


def mean_and_error(shares: Sequence[float]) -> tuple[float, float]:
    """Of numbers, one for each question, as in ``pass_at_1``."""
    spread = float(np.std(shares, ddof=1)) if len(shares) > 1 else math.nan
    return float(np.mean(shares)), spread / math.sqrt(len(shares))


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval, of 95 % by default, for a share of `count` questions, which does not vanish at 0 of n or n
    of n.

    ``(p + z²/2n ± z sqrt(p (1 - p)/n + z²/4n²)) / (1 + z²/n)``. It takes a question for one draw that is right or
    wrong; where ``p`` is a mean of several samples' shares, which vary less, it is wider than it need be.
    """
    middle, half = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    low, high = ((middle + sign * half) / (1 + z * z / count) for sign in (-1, 1))
    return max(low, 0.0), min(high, 1.0)


def margin(share: float, error: float | None, count: int) -> str:
    """What to write behind a share of `count` questions, in per cent: its standard error, or where that is 0 or there
    is none, as all went alike or it is one question, Wilson's interval."""
    if error is not None and error > 0:
        return f"± {100 * error:.1f}"
    low, high = wilson(share, count)
    return f"({100 * low:.1f} to {100 * high:.1f})"


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
    return float(np.mean(cons_shares(answers, correct, k)))


def cons_shares(answers: Sequence[Sequence[Hashable | None]], correct: Sequence[Sequence[bool]], k: int) -> list[float]:
    """Of each question the share of rounds of k that ``cons_at_k`` is the mean of."""
    shares = []
    for said, right in zip(answers, correct, strict=True):
        votes: list[tuple[bool, Hashable]] = [(ok, None if ok else one) for one, ok in zip(said, right, strict=True)]
        rounds = [votes[start : start + k] for start in range(0, len(votes) - k + 1, k)]
        shares.append(float(np.mean([_winner_is_right(votes) for votes in rounds])))
    return shares


def best_shares(scores: Sequence[Sequence[float]], correct: Sequence[Sequence[bool]], k: int) -> list[float]:
    """Of each question the share of its ⌊n / k⌋ rounds of k samples whose highest score is that of a right one; the
    first of equal scores, and any before NaN."""
    shares = []
    for given, right in zip(scores, correct, strict=True):
        ranked = [-math.inf if math.isnan(score) else score for score in given]
        rounds = [range(start, start + k) for start in range(0, len(ranked) - k + 1, k)]
        shares.append(float(np.mean([right[max(some, key=ranked.__getitem__)] for some in rounds])))
    return shares


def _winner_is_right(votes: Sequence[tuple[bool, Hashable]]) -> bool:
    given = Counter(vote for vote in votes if vote != (False, None))  # in the order of first votes
    return bool(given) and given.most_common(1)[0][0][0]
