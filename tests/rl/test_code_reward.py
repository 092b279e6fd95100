"""Code graded by tests: what is taken for the code, what passes, what pretends to, HumanEval's own solutions."""

import json
import re
import time
from pathlib import Path
from typing import Any

import hostile
import numpy as np
import pytest

from deepseek_jax.data.text import Record, read_rows
from deepseek_jax.rl import code_reward
from deepseek_jax.rl.code_reward import Pair, UnitTests, extract_code, passes, read_tests, shared_sandbox
from deepseek_jax.rl.grader import Grader
from deepseek_jax.rl.tasks import TaskConfig, make_task, score_all

HUMANEVAL = Path(__file__).parents[3] / "shared/data/HumanEval.jsonl.gz"
needs_bubblewrap = pytest.mark.skipif(bool(hostile.missing()), reason=hostile.missing())


def fenced(code: str, language: str = "python") -> str:
    return f"```{language}\n{code}\n```"


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        ("", ""),
        ("x = 1\n", "x = 1"),
        (fenced("x = 1"), "x = 1"),
        (f"First {fenced('x = 1')} or, better,\n{fenced('x = 2')}\nDone.", "x = 2"),
        (f"<think>{fenced('x = 1')}</think>So:\n{fenced('x = 2', '')}", "x = 2"),
        (f"<think>{fenced('x = 1')}</think>nothing else", "nothing else"),
        (f"<think>{fenced('x = 1')}", ""),
        (f"<answer>\n{fenced('x = 1', 'py')}\n</answer>", "x = 1"),
        ("```python\nx = 1\ny = 2", "x = 1\ny = 2"),
        ("```\nx = 1\n```python\ny = 2\n```", "y = 2"),
        (fenced("    return 1"), "    return 1"),
        ("```python\nx = '```'\n```", "x = '```'"),
        ("inline `x = 1` and ```y``` only", "inline `x = 1` and ```y``` only"),
    ],
)
def test_the_code_is_the_last_block(completion: str, code: str):
    assert extract_code(completion) == code


PAIRS = [{"input": "1 2\n", "output": "3\n"}, {"input": "-1 1\n", "output": "0"}]


@pytest.mark.parametrize(
    ("row", "tests"),
    [
        ({"tests": None}, None),
        ({"tests": ""}, None),
        ({"tests": "[]"}, None),
        ({"tests": "assert f(1)"}, UnitTests(asserts="assert f(1)")),
        ({"tests": ["assert f(1)", "assert f(2)"]}, UnitTests(asserts="assert f(1)\nassert f(2)")),
        ({"tests": PAIRS, "time_limit": 2}, UnitTests(pairs=[Pair("1 2\n", "3\n"), Pair("-1 1\n", "0")], seconds=2)),
        ({"tests": {"inputs": ["1", "2"], "outputs": ["3", "4"]}}, UnitTests(pairs=[Pair("1", "3"), Pair("2", "4")])),
        ({"tests": json.dumps(PAIRS)}, UnitTests(pairs=[Pair("1 2\n", "3\n"), Pair("-1 1\n", "0")])),
    ],
)
def test_tests_are_python_or_pairs(row: dict[str, Any], tests: UnitTests | None):
    assert read_tests(row) == tests


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"test": "x"}, 'no column "tests"; it has test'),
        ({"tests": [{"input": "1", "output": "2", "testtype": "functional"}]}, '"tests" must be Python text, a list'),
        ({"tests": {"inputs": ["1"], "outputs": ["1"], "fn_name": "f"}}, '"tests" must be Python text, a list'),
        ({"tests": {"inputs": ["1"], "outputs": []}}, '"tests" must be Python text, a list'),
        ({"tests": 3}, '"tests" must be Python text, a list'),
        ({"tests": [{"input": "1"}]}, '"tests" must be Python text, a list'),
        ({"tests": [{"input": "1", "output": 2}]}, '"tests" must be Python text, a list'),
        ({"tests": '[{"input": "1"'}, '"tests" is no JSON'),
        ({"tests": "x", "time_limit": -1}, '"time_limit" is -1; it must be seconds'),
        ({"tests": "x", "time_limit": "2 s"}, "\"time_limit\" is '2 s'; it must be seconds"),
    ],
)
def test_broken_tests_are_named(row: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        read_tests(row)


ADD = "def add(a, b):\n    return a + b"
# Each is ended before the tests, or by them, and none says so by failing.
PRETENDERS = {
    "wrong": "def add(a, b): return a - b",
    "raises": "def add(a, b): raise ValueError",
    "no function": "x = 1",
    "no Python": "def add(",
    "leaves": f"{ADD}\nimport sys\nsys.exit(0)",
    "leaves when it is called": "import sys\ndef add(a, b): sys.exit(0)",
    "leaves at once": "import os\ndef add(a, b): os._exit(0)",
    "takes exit for its own": "import os\nos._exit = lambda code: None\ndef add(a, b): raise SystemExit(0)",
    "says that all is well": "print('OK\\nPASSED')\nimport os\nos._exit(0)",
    "says its own text": "import os\nprint(open('/program/main.py').read())\nos._exit(0)",
    "says what it is given": "import os, sys\nprint(sys.stdin.read(), os.read(0, 9999))\nos._exit(0)",
    "replaces the process": "import os\nos.execv('/bin/true', ['true'])",
    "hangs": "def add(a, b):\n    while True: pass",
    "waits": "def add(a, b):\n    import time\n    time.sleep(1000)",
    "says too much": "def add(a, b):\n    while True: print('x' * 10000)",
}


@needs_bubblewrap
@pytest.mark.parametrize("name", PRETENDERS)
def test_what_pretends_to_pass_does_not(name: str):
    assert not passes(shared_sandbox(), PRETENDERS[name], UnitTests(asserts="assert add(1, 2) == 3", seconds=0.5))


@needs_bubblewrap
def test_asserts_pass_behind_code_that_is_right():
    """Whatever else it does: printing, reading, threads that go on, a main part that is not called here."""
    more = """
import dataclasses, sys, threading, time
print("hello", sys.stdin.read())
threading.Thread(target=time.sleep, args=(1000,)).start()
@dataclasses.dataclass
class Point:
    x: "int"
if __name__ == "__main__":
    raise SystemExit
"""
    for code in (ADD, ADD + more):
        assert passes(shared_sandbox(), code, UnitTests(asserts="assert add(1, 2) == 3\nassert add(0, 0) == 0"))
        assert not passes(shared_sandbox(), code, UnitTests(asserts="assert add(1, 2) == 3\nassert add(0, 0) == 1"))


@needs_bubblewrap
@pytest.mark.parametrize(
    ("code", "right"),
    [
        ("print(sum(map(int, input().split())))", True),
        ("import sys\nprint(' ', eval(sys.stdin.read().strip().replace(' ', '+')), '\\n')", True),
        ("if __name__ == '__main__': print(sum(map(int, input().split())))", True),
        ("print(3)", False),
        ("print(sum(map(int, input().split())), 0)", False),
        ("print(sum(map(int, input().split())))\nraise SystemExit(1)", False),
        ("input(); input()", False),
        ("import time; print(sum(map(int, input().split()))); time.sleep(1000)", False),
    ],
)
def test_programs_say_what_is_expected_of_them(code: str, right: bool):
    tests = read_tests({"tests": PAIRS, "time_limit": 0.5})
    assert tests is not None and passes(shared_sandbox(), code, tests) is right


@needs_bubblewrap
def test_all_the_tests_of_a_program_have_a_time_together(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(code_reward, "_ALL_SECONDS", 0.0)
    assert not passes(shared_sandbox(), "print(1)", UnitTests(pairs=[Pair("", "1")] * 2))


@needs_bubblewrap
def test_rows_with_tests_are_graded_beside_others():
    rows = [
        Record({"tests": "assert add(1, 2) == 3", "checks": ""}, "t.jsonl:1"),
        Record({"tests": None, "checks": PAIRS}, "t.jsonl:2"),
    ] * 2
    said = [fenced(ADD), fenced("print(sum(map(int, input().split())))"), "I cannot.", fenced(ADD)]
    with Grader(("code=0.5",)) as grader:
        grader.check(rows)
        grades = grader.grade(said, rows)
        np.testing.assert_array_equal(grades.rewards["code"], [1, np.nan, 0, np.nan])
        np.testing.assert_array_equal(grades.total_N, [0.5, 0, 0, 0])
        with pytest.raises(ValueError, match='t.jsonl:3: reward code: "tests" must be'):
            grader.check([*rows, Record({"tests": 1}, "t.jsonl:3")])
    task = make_task(TaskConfig(name="code", prompt="problem", answer="checks"))
    assert task.messages({"problem": "Add."})[-1]["content"].startswith("Add.\n\nAnswer with the whole program")
    assert score_all(task.accuracy, said, rows) == [None, 1.0, None, 0.0]
    assert task.right(rows[0]) is None and task.rewards == ("accuracy",)


HALF = {
    "prompt": 'import math\n\ndef twice(x):\n    return 2 * x\n\ndef half(x):\n    """Half of x, floored."""\n',
    "entry_point": "half",
    "canonical_solution": "    return math.floor(x / 2)\n",
    "test": "def check(candidate):\n    assert candidate(3) == 1\n    assert candidate(twice(4)) == 4\n",
}


@needs_bubblewrap
def test_humaneval_asks_for_a_function_and_checks_it():
    task = make_task(TaskConfig(name="humaneval"))
    row = Record(HALF, "h.jsonl:1")
    assert f"```python\n{HALF['prompt']}\n```" in task.messages(row)[-1]["content"]
    said = {
        fenced(task.right(row) or ""): 1.0,
        fenced("def half(x):\n    return math.floor(x / 2)"): 1.0,  # what the prompt imports is there
        fenced("def half(x):\n    return x / 2"): 0.0,
        fenced(HALF["prompt"]): 0.0,
        "": 0.0,
    }
    assert score_all(task.accuracy, [*said], [row] * len(said)) == [*said.values()]
    for broken, message in (
        ({"test": None}, '"test" is None; it must be text'),
        ({"entry_point": 3}, '"entry_point" is 3'),
    ):
        with pytest.raises(ValueError, match=message):
            task.accuracy("", HALF | broken)
    with pytest.raises(ValueError, match='no column "entry_point"'):
        task.accuracy("", {"prompt": "", "test": ""})
    with pytest.raises(ValueError, match=re.escape("task.answer='x': humaneval's columns have names of their own")):
        make_task(TaskConfig(name="humaneval", answer="x"))


@needs_bubblewrap
def test_humanevals_own_solutions_pass():
    if not HUMANEVAL.exists():
        pytest.skip("HumanEval is not here: no shared/data/HumanEval.jsonl.gz beside the repository")
    task, rows, start = make_task(TaskConfig(name="humaneval")), [*read_rows([str(HUMANEVAL)])], time.monotonic()
    task.check(rows)
    scores = score_all(task.accuracy, [fenced(task.right(row) or "") for row in rows], rows)
    print(f"{len(rows)} problems in {time.monotonic() - start:.1f} s, {shared_sandbox().count} at a time")
    assert scores == [1.0] * 164


@pytest.mark.parametrize("name", ["humaneval", "code"])
def test_without_bubblewrap_a_task_with_programs_is_refused(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    shared_sandbox.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="the package bubblewrap"):
        make_task(TaskConfig(name=name))
    with pytest.raises(ValueError, match="the package bubblewrap"):
        Grader(("code",))
