"""The cases of ``reward_cases``, and MATH-500's own answers, as a grader gives them."""

import json
import random
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from rl.reward_cases import BOMBS, CHOICE, LANGUAGE, MATHS, OVERLONG, REPETITION, TAGS, WHOLE

from deepseek_jax.rl.grader import Grader
from deepseek_jax.rl.rewards import tags_reward
from deepseek_jax.rl.rewards.language import language
from deepseek_jax.rl.rewards.length import length, overlong
from deepseek_jax.rl.rewards.repetition import repetition
from deepseek_jax.rl.tasks import TaskConfig, make_task

MATH500 = Path(__file__).parents[3] / "shared" / "data" / "math500.json"
Cases = list[tuple[str, str, int]]


@pytest.fixture(scope="module")
def maths() -> Iterator[Grader]:
    pytest.importorskip("math_verify", reason="math-verify (the extra rewards) is not installed")
    with Grader(("maths",), task=make_task(TaskConfig()), workers=4) as made:
        yield made


def wrong(grader: Grader, cases: Cases) -> list[tuple[str, str, int]]:
    """Those that are not scored as they should be, shortened; what ended a worker is told by the failures."""
    grades = grader.grade([text for _, text, _ in cases], [{"answer": right} for right, *_ in cases])
    (scores,) = grades.rewards.values()
    pairs = zip(cases, scores, strict=True)
    return [(right[:50], text[:50], score) for (right, text, score), found in pairs if found != score]


def boxed(cases: Cases) -> Cases:
    return [(right, f"<think>Well.</think>\\boxed{{{said}}}", score) for right, said, score in cases]


def test_there_are_enough_cases_of_either_kind():
    by_name = [case for cases in (MATHS, WHOLE, CHOICE) for group in cases.values() for case in group]
    assert len(by_name) + sum(map(len, (BOMBS, TAGS, LANGUAGE, REPETITION, OVERLONG))) > 450
    assert 0.3 < np.mean([score for _, _, score in by_name]) < 0.7


@pytest.mark.parametrize("category", MATHS)
def test_maths(maths: Grader, category: str):
    assert not wrong(maths, boxed(MATHS[category]))


@pytest.mark.parametrize("category", WHOLE)
def test_the_answer_is_found(maths: Grader, category: str):
    assert not wrong(maths, WHOLE[category])


def test_nothing_hangs_or_ends_the_trainer(maths: Grader):
    assert not wrong(maths, boxed(BOMBS))
    assert maths.grade(["\\boxed{4}"], [{"answer": "4"}]).total_N.tolist() == [1]


def test_a_worker_that_an_answer_ends_costs_that_answer_its_reward(maths: Grader, monkeypatch: pytest.MonkeyPatch):
    """Killed from outside for want of time: 0 and counted, nothing to stop for, and no share in the group's mean."""
    assert maths._pool is not None
    monkeypatch.setattr(maths._pool, "_time_limit", 1e-6)
    grades = maths.grade(["\\boxed{4}", "\\boxed{5}"], [{"answer": "4"}] * 2)
    assert grades.total_N.tolist() == [0, 0] and not grades.failed_N.any()
    assert grades.metrics()["reward_timeouts"] == 2


@pytest.mark.parametrize("category", CHOICE)
def test_choice(category: str):
    with Grader(("choice",), task=make_task(TaskConfig())) as grader:
        assert not wrong(grader, CHOICE[category])


@pytest.mark.parametrize(("completion", "score"), TAGS, ids=range(len(TAGS)))
def test_tags(completion: str, score: int):
    assert tags_reward(completion) == score


@pytest.mark.parametrize(("target", "completion", "score"), LANGUAGE, ids=range(len(LANGUAGE)))
def test_language(target: str, completion: str, score: float | None):
    assert language(target)(completion, {}) == (None if score is None else pytest.approx(score))
    assert language("en")(completion, {"language": target}) == language(target)(completion, {})


@pytest.mark.parametrize(("n", "completion", "score"), REPETITION, ids=range(len(REPETITION)))
def test_repetition(n: int, completion: str, score: float):
    assert repetition(n)(completion, {}) == pytest.approx(score)


@pytest.mark.parametrize(("count", "limit", "buffer", "score"), OVERLONG)
def test_length(count: int, limit: int, buffer: int, score: float):
    assert overlong(count, limit, buffer) == pytest.approx(score)
    assert length(limit, buffer)("word " * count, {}) == pytest.approx(score)


PIECES = [
    "a",
    " ",
    "$",
    "$$a",
    "`",
    "```a",
    "\\(",
    "\\[",
    "\\a{",
    "{",
    "Answer: ",
    "answer",
    "<answer>",
    "</think>",
    "数a",
]


@pytest.mark.parametrize("piece", PIECES)
def test_the_cost_is_linear(piece: str):
    """Half a million characters of anything are read in a moment: a quadratic search would take hours."""
    said, rewards = (
        piece * (500_000 // len(piece)),
        ("choice", "tags", "format", "language", "repetition", "length:9:9"),
    )
    with Grader(rewards, task=make_task(TaskConfig())) as grader:
        grades = grader.grade([said, f"<think>{said}</think>{said}"], [{"answer": "C"}] * 2)
    assert set(grades.rewards) == {reward.partition(":")[0] for reward in rewards}
    assert not grades.failed_N.any() and np.isfinite(grades.total_N).all()


# MATH-500's texts that are one value: all others are different.
SAME = [
    ("2\\sqrt{5}", "2 \\sqrt{5}"),
    ("\\frac14", "\\frac{1}{4}"),
    ("5", "x=5"),
    ("15", "15\\mbox{ cm}^2"),
    ("36", "36^\\circ", "\\$36"),
    ("30", "30^\\circ"),
    ("90", "90^\\circ"),
    ("120", "120^\\circ"),
    ("10080", "10,\\!080"),
    ("1,-2", "-2,1"),
]
# And different ones that are let pass: a list in brackets, a base where none was asked for, an equation's right side.
PASSED = [("-2,1", "1,-2", "(-2,1)"), ("40", "40_9"), ("0", "5x - 7y + 11z + 4 = 0")]


def answers() -> list[str]:
    if not MATH500.exists():
        pytest.skip("needs shared/data/math500.json")
    return sorted({row["answer"] for row in json.loads(MATH500.read_text(encoding="utf-8"))})


BY_VALUE = """
from deepseek_jax.rl.rewards import maths

def by_value(completion, row):
    return float(maths._verify(maths._parse_right(row["answer"]), maths._parse(maths._boxed(completion))))
"""


def test_math500s_answers_equal_themselves(maths: Grader, tmp_path: Path):
    """All 500, which are 301 texts: as text, and, that being left out, by what math-verify makes of them."""
    found = [(answer, answer, 1) for answer in answers()]
    assert not wrong(maths, boxed(found))
    (tmp_path / "mine.py").write_text(BY_VALUE)
    with Grader((f"{tmp_path / 'mine.py'}:by_value",), workers=4) as grader:
        assert not wrong(grader, found)


def test_pairs_of_different_answers_do_not_equal(maths: Grader):
    """Of each answer and two others; ``scripts/bench_rewards.py --pairs`` tried all (docs/results/rewards.md)."""
    found, rng = answers(), random.Random(0)
    pairs = [(answer, other) for answer in found for other in rng.sample(found, 2) if answer != other]
    pairs = [pair for pair in pairs if not any(set(pair) <= set(same) for same in SAME + PASSED)]
    assert not wrong(maths, boxed([(right, said, 0) for right, said in pairs]))


def test_one_value_in_two_texts_is_equal(maths: Grader):
    assert not wrong(maths, boxed([(*pair, 1) for same in SAME for pair in permutations(same, 2)]))
