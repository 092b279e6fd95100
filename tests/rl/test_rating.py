"""The rating beside the likelihood's own maximum, and solvers whose rating is known."""

import math

import numpy as np
import pytest

from deepseek_jax.rl.programs import rated
from deepseek_jax.rl.rating import rating


def likelihood(r: float, difficulties, solved) -> float:
    p = 1 / (1 + 10 ** ((np.asarray(difficulties) - r) / 400))
    return float(np.sum(np.log(np.where(solved, p, 1 - p))))


def test_it_is_the_most_likely_rating():
    difficulties, solved = [800, 1200, 1500, 1900, 2400, 3500], [True, True, False, True, False, False]
    found, stderr = rating(difficulties, solved)
    around = np.linspace(found - 300, found + 300, 601)
    assert abs(around[np.argmax([likelihood(r, difficulties, solved) for r in around])] - found) < 1
    curvature = (
        likelihood(found + 1, difficulties, solved)
        + likelihood(found - 1, difficulties, solved)
        - 2 * likelihood(found, difficulties, solved)
    )
    assert stderr == pytest.approx(1 / math.sqrt(-curvature), rel=1e-3)
    assert rating([1500, 1500], [True, False])[0] == pytest.approx(1500, abs=1e-3)
    assert rating([1500] * 11, [True] * 10 + [False])[0] == pytest.approx(1900, abs=1e-3)  # odds of ten to one


@pytest.mark.parametrize("strength", [1300, 1900, 2600])
def test_solvers_of_known_strength(strength):
    """Estimates of 300 simulated solvers: no bias to speak of, and 95 % of them within 1.96 errors."""
    rng, found = np.random.default_rng(strength), []
    for _ in range(300):
        difficulties = rng.integers(8, 36, 80) * 100
        solved = rng.random(80) < 1 / (1 + 10 ** ((difficulties - strength) / 400))
        found.append(rating(difficulties.tolist(), solved.tolist()))
    estimates, errors = np.array(found).T
    assert abs(estimates.mean() - strength) < 20
    assert 0.9 < np.mean(abs(estimates - strength) < 1.96 * errors) < 0.99


def test_all_or_none_have_no_rating_and_rows_without_one_no_figures():
    assert rating([800, 900], [False, False]) == (-math.inf, math.inf)
    assert rating([800], [True]) == (math.inf, math.inf)
    with pytest.raises(ValueError, match="0 difficulties of 1 problems"):
        rating([], [True])
    assert rated([({"rating": None}, "", True), ({}, "", False)]) == {}
    assert rated([({"rating": 1500}, "", True), ({"cf_rating": 1500}, "", False), ({}, "", True)])["rating"] == (
        pytest.approx(1500, abs=1e-3)
    )


def test_answers_to_one_problem_are_one_draw():
    """Sixteen answers to each do not make the error a quarter: they go alike."""
    rows = [{"rating": 1400}, {"rating": 1600}]
    once = rated([(row, "", row["rating"] < 1500) for row in rows])
    assert rated([(row, "", row["rating"] < 1500) for row in rows for _ in range(16)]) == once
    halves = rated([(row, "", right) for row in rows for right in (True, False)])
    assert halves["rating"] == pytest.approx(1500, abs=1e-3)
