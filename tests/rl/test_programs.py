"""Contest problems in the forms of their data sets: what is asked, which tests are run, what is refused."""

import base64
import json
import pickle
import zlib

import pytest

from deepseek_jax.rl.contest_tests import read_contest_tests
from deepseek_jax.rl.tasks import TaskConfig, make_task


def packed(value) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def pairs(*given, kind="stdin") -> str:
    return json.dumps([{"input": said, "output": expected, "testtype": kind} for said, expected in given])


LIVE = {
    "question_content": "Double it.",
    "starter_code": "",
    "public_test_cases": pairs(("1\n", "2")),
    "private_test_cases": packed(pairs(("3\n", "6"), ("1\n", "2"))),
    "metadata": "{}",
}
FUNCTION = LIVE | {
    "starter_code": "class Solution:\n    def pick(self, nums: List[int], at: int) -> int:\n        ",
    "public_test_cases": pairs(("[1, 2]\n1", "2"), kind="functional"),
    "private_test_cases": packed(pairs(('["a", "b"]\n0', '"a"'), kind="functional")),
    "metadata": '{"func_name": "pick"}',
}
CODEFORCES = {
    "description": "Add them.",
    "input_format": "Two integers.",
    "output_format": "Their sum.",
    "note": None,
    "examples": [{"input": "1 2\n", "output": "3\n"}],
    "official_tests": [{"input": "5 5\n", "output": "10\n"}],
    "time_limit": 2.0,
    "rating": 800,
}
CONTESTS = {
    "description": "Add them.",
    "public_tests": {"input": ["1 2\n"], "output": ["3\n"]},
    "private_tests": {"input": [], "output": []},
    "time_limit": {"seconds": 1, "nanos": 500_000_000},
    "cf_rating": 900,
}


def fenced(code: str) -> str:
    return f"<think>hm</think>```python\n{code}\n```"


def test_what_is_asked():
    live = make_task(TaskConfig(name="livecodebench"))
    assert live.messages(LIVE)[0]["content"] == "Double it.\n\nAnswer with the whole program in one ```python block."
    assert "Begin with this code.\n```python\nclass Solution:" in live.messages(FUNCTION)[0]["content"]
    asked = make_task(TaskConfig(name="codeforces")).messages(CODEFORCES)[0]["content"]
    assert asked.startswith(
        "Add them.\n\nInput\nTwo integers.\n\nOutput\nTheir sum.\n\nExample input\n1 2\n\nExample output\n3\n\nAnswer"
    )
    own = make_task(TaskConfig(name="codeforces", template="{description}!"))
    assert own.messages(CODEFORCES)[0]["content"] == "Add them.!"


def test_public_and_hidden_tests_are_run():
    live, codeforces = make_task(TaskConfig(name="livecodebench")), make_task(TaskConfig(name="codeforces"))
    says = lambda value: fenced(f"print({value})")  # noqa: E731
    double, one = says("2 * int(input())"), says("2")
    assert [live.accuracy(text, LIVE) for text in (double, one)] == [1, 0]
    pick = "class Solution:\n    def pick(self, nums: List[int], at: int) -> int:\n        return nums[at]"
    assert [live.accuracy(fenced(code), FUNCTION) for code in (pick, pick.replace("[at]", "[-1]"))] == [1, 0]
    add, three = says("sum(map(int, input().split()))"), says("3")
    assert [codeforces.accuracy(text, CODEFORCES) for text in (add, three, "")] == [1, 0, 0]
    assert [codeforces.accuracy(text, CONTESTS) for text in (add, says("4"))] == [1, 0]
    assert codeforces.figures is not None
    found = codeforces.figures([(CODEFORCES, add, True), (CONTESTS, three, False)])
    assert 800 < found["rating"] < 900


def test_each_test_once_and_its_time():
    read = lambda row, *names: read_contest_tests(row, names)  # noqa: E731
    both = read(LIVE, "public_test_cases", "private_test_cases")
    assert both is not None and both.pairs == [("1\n", "2"), ("3\n", "6")]
    assert (tests := read(CONTESTS, "public_tests", "private_tests")) is not None and tests.seconds == 1.5
    assert read({"tests": "", "more": None}, "tests", "more") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"private_test_cases": packed(print)}, "a pickle of something else than text"),
        ({"private_test_cases": packed(["[]", "[]"])}, "a pickle of something else than text"),
        ({"private_test_cases": "bm90IHppcA=="}, '"private_test_cases" is neither JSON nor packed tests: .*header'),
        ({"private_test_cases": "%"}, "neither JSON nor packed"),
        ({"private_test_cases": "[1]"}, '"private_test_cases" must be a list of {"input"'),
        ({"private_test_cases": {"input": ["1"], "output": []}}, "as many inputs as outputs"),
        ({"private_test_cases": pairs(("1", "2"), kind="functional")}, "kinds functional, stdin; expected"),
        ({"public_test_cases": None, "private_test_cases": FUNCTION["public_test_cases"]}, '"metadata" names none: {}'),
        ({"generated_checker": "def check(): ..."}, "judged by a program"),
        ({"time_limit": "1 s"}, "\"time_limit\" is '1 s'; it must be seconds"),
    ],
)
def test_what_is_no_test_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        read_contest_tests(LIVE | change, ("public_test_cases", "private_test_cases"))


def test_a_column_that_is_missing_is_named():
    with pytest.raises(ValueError, match='no column "official_tests|private_tests"'):
        make_task(TaskConfig(name="codeforces")).accuracy("", {"description": "?", "examples": []})
