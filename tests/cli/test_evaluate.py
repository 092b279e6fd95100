"""What ``eval`` prints of its figures."""

import math

import pytest

from deepseek_jax.cli.evaluate import _shares

FIGURES = {"questions": 30, "samples": 2, "pass@1": 0.0, "stderr": 0.0, "cut_off": 0.5, "tokens": 7.0}


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({}, "pass@1 0.0 % (0.0 to 11.4)   30 questions"),
        ({"pass@1": 0.5, "stderr": 0.04}, "pass@1 50.0 % ± 4.0   30 questions"),
        ({"rating": 1200.0, "rating_stderr": 50.0}, "rating 1200   rating_stderr 50   30"),
        ({"rating": -math.inf, "rating_stderr": math.inf}, "no rating, as none of the rated problems were solved   30"),
        ({"rating": math.inf, "rating_stderr": math.inf}, "no rating, as all of the rated problems were solved   30"),
        ({"instructions": 0.25}, "instructions 0.25   30"),
    ],
)
def test_figures(more, told):
    assert told in _shares(FIGURES | more)
