"""A solver's rating from the problems that it solved, by the formula of Elo."""

import math
from collections.abc import Sequence

import numpy as np

_SCALE = math.log(10) / 400


def rating(difficulties: Sequence[float], solved: Sequence[bool | float]) -> tuple[float, float]:
    """The rating r under which what was solved is most likely, and its standard error.

    A solver of rating r solves a problem of difficulty d with probability ``p(d) = 1 / (1 + 10^((d - r) / 400))``, each
    by itself; the likelihood is highest where ``sum(solved) = sum(p)``, and the error is Fisher's, ``400 / ln 10 /
    sqrt(sum(p (1 - p)))``. Of a problem that was tried several times, ``solved`` is the share of those that solved it.

    It is no place in a contest, which counts time and wrong attempts too. Where all problems or none were solved
    there is no such r: inf or -inf, with an error of inf.
    """
    d, s = np.asarray(difficulties, float), np.asarray(solved, float)
    if d.shape != s.shape or not d.size or not np.isfinite(d).all():
        raise ValueError(f"{d.size} difficulties of {s.size} problems: expected as many finite numbers, at least one")
    if s.min() == s.max() and s.max() in (0.0, 1.0):
        return (math.inf if s.max() else -math.inf), math.inf
    low, high = d.min() - 4000.0, d.max() + 4000.0  # where a share of 1e-10 is met
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if _expected(d, middle).sum() < s.sum() else (low, middle)
    p = _expected(d, low)
    return float(low), float(1 / (_SCALE * math.sqrt(np.sum(p * (1 - p)))))


def _expected(d: np.ndarray, r: float) -> np.ndarray:
    return 1 / (1 + np.exp(_SCALE * (d - r)))
