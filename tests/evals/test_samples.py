"""pass@1, pass@k and cons@k beside their definitions by enumeration."""

import itertools

import numpy as np
import pytest

from deepseek_jax.evals.samples import best_shares, cons_at_k, margin, pass_at_1, pass_at_k, wilson


def test_pass_at_k_is_the_mean_over_all_choices_of_k():
    rng = np.random.default_rng(0)
    correct = [(rng.random(6) < p).tolist() for p in (0, 0.2, 0.5, 0.9, 1)]
    for k in range(1, 7):
        chosen = [[any(some) for some in itertools.combinations(samples, k)] for samples in correct]
        np.testing.assert_allclose(pass_at_k(correct, k), np.mean([np.mean(c) for c in chosen]), rtol=1e-12)
    with pytest.raises(ValueError, match="pass@7 needs 7 samples"):
        pass_at_k(correct, 7)


def test_the_standard_error_is_that_of_questions():
    correct = [[True, True], [False, False], [True, False]]
    mean, stderr = pass_at_1(correct)
    np.testing.assert_allclose([mean, stderr], [0.5, np.std([1, 0, 0.5], ddof=1) / np.sqrt(3)])
    assert np.isnan(pass_at_1([[True]])[1])


def test_the_interval_holds_every_share_that_the_normal_test_does_not_refuse():
    for share, count in ((0.0, 30), (1.0, 30), (0.5, 10), (0.3, 200)):
        low, high = wilson(share, count)
        shares = np.linspace(0, 1, 100_001)
        kept = shares[abs(share - shares) <= 1.96 * np.sqrt(shares * (1 - shares) / count)]
        np.testing.assert_allclose([low, high], [kept[0], kept[-1]], atol=2e-5)


def test_what_stands_behind_a_share():
    assert margin(0.5, 0.0123, 30) == "± 1.2"
    assert margin(0.0, 0.0, 30) == margin(0.0, None, 30) == margin(0.0, float("nan"), 30) == "(0.0 to 11.4)"


def test_the_best_of_several():
    scores, right = (
        [[0.1, 0.9, 0.9, 0.2], [np.nan, -5.0, 1.0, 2.0]],
        [[True, False, True, True], [False, True, False, True]],
    )
    assert best_shares(scores, right, 1) == [0.75, 0.5]
    assert best_shares(scores, right, 2) == [0.5, 1.0]  # of equal ones the first; any before NaN
    assert best_shares(scores, right, 3) == [0.0, 0.0] and best_shares(scores, right, 4) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("said", "right", "k", "share"),
    [
        (["7", "8", "7", "9"], [True, False, True, False], 4, 1.0),
        (["8", "7", "8", "8"], [False, True, False, False], 4, 0.0),
        (["7", "7.0", "8", "8"], [True, True, False, False], 4, 1.0),  # equal to the right one is one answer
        (["8", "7"], [False, True], 2, 0.0),  # of two the first
        ([None, None, None, "7"], [False, False, False, True], 4, 1.0),  # no answer, no vote
        ([None, None], [False, False], 2, 0.0),
        (["7", "8", "8", "7"], [True, False, False, True], 2, 0.5),  # two rounds of two
    ],
)
def test_the_majority(said, right, k, share):
    assert cons_at_k([said], [right], k) == share
