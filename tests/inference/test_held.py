"""Grammars as several processes follow them: see tests/parallel/test_serving.py for two real ones."""

import time

import jax
import pytest

from deepseek_jax.inference.constraints import Constraint
from deepseek_jax.inference.held import Held
from deepseek_jax.inference.plans import Request
from deepseek_jax.inference.sampling import SamplingParams


@pytest.fixture
def request_(monkeypatch) -> Request:
    """Of two processes, as the one that is not asked knows it."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    return Request(3, [1], SamplingParams(regex="a"))


def test_a_process_that_cannot_follow_tells_why(request_):
    def begin(sampling: SamplingParams) -> Constraint:
        raise ValueError(f"no llguidance for {sampling.regex}")

    held, last = Held(begin), time.monotonic() + 20
    held.wait(request_)
    assert request_.unsettled == 2 and not request_.ready
    while not (found := held.found()):
        assert time.monotonic() < last
    assert [number for number, _ in found] == [3] and "no llguidance for a" in found[0][1]
    assert not held.found()


def test_who_is_given_up_is_asked_about_no_more(request_):
    held = Held(lambda sampling: Constraint(None, 1))
    held.wait(request_)
    held.forget(3)
    held.forget(4)
    assert not held.found()
