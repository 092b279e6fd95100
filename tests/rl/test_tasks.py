"""Tasks: what each makes of a row, what it takes for right, and what it says of a row that it cannot use."""

import dataclasses
import gc
import json
import os
import subprocess
import sys
from fractions import Fraction
from itertools import permutations, product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.data.text import Record
from deepseek_jax.rl import mathematics, tasks
from deepseek_jax.rl.answers import is_right
from deepseek_jax.rl.arithmetic import make_problem
from deepseek_jax.rl.countdown import reaches
from deepseek_jax.rl.grader import Grader
from deepseek_jax.rl.rewards import accuracy_reward
from deepseek_jax.rl.rewards.named import NAMED
from deepseek_jax.rl.tasks import TASKS, Task, TaskConfig, make_task, score_all

MATH = Path(__file__).parents[3] / "shared/data/math500.json"
ROW = Record({"question": "1+1?", "unit": "m", "answer": "2", "n": 3, "nums": [1, 2]}, "rows.jsonl:4")


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def test_a_column_a_template_or_a_chat_is_asked():
    assert make_task(TaskConfig(prompt="question")).messages(ROW) == user("1+1?")
    assert make_task(TaskConfig()).messages({"prompt": "?"}) == user("?")
    template = r"{question} In {unit}, {n} of {nums}: \boxed{} or {{x}}"
    asked = make_task(TaskConfig(template=template, system="Be brief.")).messages(ROW)
    assert asked == [
        {"role": "system", "content": "Be brief."},
        *user(r"1+1? In m, 3 of [1, 2]: \boxed{} or {x}"),
    ]
    chat = [*user("hi"), {"role": "assistant", "content": "ho"}, *user("and?")]
    assert make_task(TaskConfig(prompt="chat")).messages({"chat": chat}) == chat


@pytest.mark.parametrize(
    ("config", "row", "message"),
    [
        ({}, {}, r'no column "prompt"; it has question, unit, answer, n, nums'),
        ({"template": "{question} {unti}"}, {}, r'no column "unti"; it has'),
        ({"template": "{chat}"}, {"chat": user("x")}, '"chat" is of type list; a template takes text and numbers'),
        ({"prompt": "n"}, {}, '"n" is of type int; it must be text or a list of messages'),
        ({"prompt": "unit"}, {"unit": None}, '"unit" is of type NoneType'),
        ({"prompt": "nums"}, {}, "message 0 is of type int; it must be"),
        ({"prompt": "chat"}, {"chat": [{"role": "assistant", "content": "x"}]}, "last message has role 'assistant'"),
        ({"prompt": "unit"}, {"unit": "\ud800"}, "surrogates not allowed"),
        (
            {"name": "gsm8k"},
            {"question": None},
            '"question" is of type NoneType',
        ),
        ({"name": "countdown"}, {}, 'no column "target"'),
        (
            {"name": "countdown"},
            {"nums": [1, "2"], "target": 3},
            r'"nums" is \[1, .2.\]; it must be a list of integers',
        ),
        ({"name": "countdown"}, {"target": 3.5}, '"target" is 3.5; it must be an integer'),
        ({"name": "arithmetic"}, {}, "expected the fields kind, a, b, prompt, answer, trace, got question"),
    ],
)
def test_a_row_that_gives_no_question_is_named(config, row, message):
    with pytest.raises(ValueError, match=rf"^rows\.jsonl:4: .*{message}"):
        make_task(TaskConfig(**config)).check([Record(ROW | row, ROW.where)])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"name": "gsm9k"},
            "task.name='gsm9k': expected rows, arithmetic, .*gsm8k, .* or file.py:function",
        ),
        ({"name": "none.py:ask"}, r"none\.py:ask: there is no file none\.py"),
        ({"prompt": "q", "template": "{q}"}, "task.prompt='q' is not used"),
        ({"name": "arithmetic", "answer": "x"}, "task.answer='x': the task arithmetic asks its own problems"),
    ],
)
def test_a_task_that_makes_no_sense_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        make_task(TaskConfig(**config))


def test_a_users_file_asks(tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from beside import ASK\n"
        "def text(row): return ASK + row['question']\n"
        "def chat(row): return [{'role': 'user', 'content': row['question']}]\n"
        "def broken(row):\n    return row['q']\n"
        "def two(row, more): pass\n"
    )
    (tmp_path / "beside.py").write_text("ASK = 'Q: '\n")
    assert make_task(TaskConfig(name=f"{path}:text")).messages(ROW) == user("Q: 1+1?")
    task = make_task(TaskConfig(name=f"{path}:chat", system="s", answer="n"))
    assert task.messages(ROW)[1:] == user("1+1?") and task.accuracy("3", ROW) == 1
    with pytest.raises(ValueError, match=r"rows\.jsonl:4: broken: KeyError: 'q' \(mine\.py:5\)"):
        make_task(TaskConfig(name=f"{path}:broken")).messages(ROW)
    with pytest.raises(ValueError, match=r"two\(row, more\) is called with 1 arguments"):
        make_task(TaskConfig(name=f"{path}:two"))
    with pytest.raises(ValueError, match=r"no function none; it has text, chat, broken, two"):
        make_task(TaskConfig(name=f"{path}:none"))
    with pytest.raises(ValueError, match="makes the question"):
        make_task(TaskConfig(name=f"{path}:text", prompt="x"))


def test_a_users_function_that_hangs_or_dies_is_told_with_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "mine.py"
    path.write_text(
        "import os, time\n"
        "def ask(row):\n"
        "    if row['do'] == 'hang': time.sleep(100)\n"
        "    if row['do'] == 'die': os._exit(7)\n"
        "    if row['do'] == 'exit': raise SystemExit(2)\n"
        "    if row['do'] == 'bytes': return b'x'\n"
        "    if row['do'] == 'none': return None\n"
        "    return str(os.getpid())\n"
    )
    monkeypatch.setattr(tasks, "_ASK_SECONDS", 0.5)
    task = make_task(TaskConfig(name=f"{path}:ask"))
    told = {
        "hang": r"mine\.py:ask took more than 0\.5 s",
        "die": "ask: its process ended with code 7",
        "exit": r"ask: SystemExit: 2 \(mine\.py:5\)",
        "bytes": "ask: TypeError: returned b'x', of type bytes, which JSON has no form for",
        "none": "messages",
    }
    pids = set()
    for line, (do, message) in enumerate(told.items(), 1):
        with pytest.raises(ValueError, match=rf"^t\.jsonl:{line}: .*{message}"):
            task.check([Record({"do": do}, f"t.jsonl:{line}")])
        pids.add(int(task.messages({"do": "go on"})[0]["content"]))
    assert len(pids) == 2 and os.getpid() not in pids  # the one after the hang, and the one after the death
    del task
    gc.collect()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("72", "72", True),
        ("<think>71 or 73</think>\nSo she sold 1,072.0 clips.", "1072", True),
        ("It is 72, not 71", "72", False),
        ("<think>so 72", "72", False),
        ("<think>x</think>", "72", False),
        (r"<think>\boxed{71}</think>first 70, \boxed{72 \text{clips}}, not 3", "72", True),
        (r"\boxed{71} or \boxed{72", "72", True),  # nothing is boxed at last: the last number
        ("3 apples\n#### $72.\nbecause of 5", "72", True),
        ("47-38", "38", True),
        ("it is -38", "-38", True),
        ("1,0000", "10000", False),
        ("the cat", "cat", False),
        (r"so \boxed{cat}", "cat", True),
        ("#### x + 1 ", "x + 1", True),
        ("cat\u2028", "cat", True),
        ("٧٢", "72", False),
        ("no number", "72", False),
        ("50%", "50", True),
        (".5", "0.5", True),
        ("<think>x</think> <answer> cat </answer>", "cat", True),
        (r"<answer>71</answer> <answer>\boxed{72}</answer> or 3", "72", True),
        ("<think>x</think><answer>72", "72", True),
        ("<think>the <answer>cat</answer>", "cat", False),
    ],
)
def test_final_answers(completion, answer, right):
    assert is_right(completion, answer) == right


def test_long_completions_are_compared_at_once():
    for text in (
        "1,000" * 400_000,
        "\\boxed{" * 300_000,
        "9" * 2_000_000,
        "{" * 2_000_000 + "#### 1,000" + ",000" * 99,
    ):
        assert not is_right(text, "3")


def test_gsm8k():
    task = make_task(TaskConfig(name="gsm8k"))
    row = {"question": "How many?", "answer": "There are 1,071+1.\n#### 1,072"}
    assert task.messages(row) == user("How many?\nGive the final answer alone, as #### NUMBER.")
    assert task.right(row) == "1,072"
    assert [task.accuracy(text, row) for text in ("#### 1072", "<think>x</think>1,072", "1071", "")] == [1, 1, 0, 0]
    with pytest.raises(ValueError, match="no #### with a number"):
        task.accuracy("1", {"answer": "1"})
    named = make_task(TaskConfig(name="gsm8k", prompt="q", answer="a"))
    assert (
        named.messages({"q": "Why?"})[0]["content"].startswith("Why?\n") and named.accuracy("2", {"a": "#### 2"}) == 1
    )


def test_answers_of_rows():
    task = make_task(TaskConfig(answer="a"))
    assert [task.accuracy("3", {"a": value}) for value in ("3", 3, 3.0, 4, "", None)] == [1, 1, 1, 0, None, None]
    assert [task.right({"a": value}) for value in ("x", 3, None)] == ["x", "3", None]
    with pytest.raises(ValueError, match='no column "a"; it has b'):
        task.accuracy("3", {"b": 3})
    with pytest.raises(ValueError, match='"a" is of type list; it must be text or a number'):
        task.accuracy("3", {"a": [3]})


def test_countdown():
    task = make_task(TaskConfig(name="countdown"))
    row = {"nums": [3, 8, 5], "target": 49}
    asked = task.messages(row)[0]["content"]
    assert "Make 49 from the numbers [3, 8, 5]" in asked and asked.endswith("#### EXPRESSION.")
    assert task.accuracy("<think>hm</think>(3 + 5) * 8\n#### (3 + 8) * 5 - 6", row) == 0
    assert task.accuracy("<think>hm</think>let me see\n8 * 5 + 3 * 3", row) == 0
    row["target"] = 43
    assert task.right(row) == "43"
    for text in ("8*5+3", "so\n8×5+3 = 43", "#### (3+8*5)", r"\boxed{3 + 8*5}"):
        assert task.accuracy(f"<think>hm</think>{text}", row) == 1
    other = make_task(TaskConfig(name="countdown", prompt="n", answer="t", template="{n} to {t}"))
    assert other.messages({"n": [1, 2], "t": 3}) == user("[1, 2] to 3") and other.accuracy("1+2", {"n": [1, 2], "t": 3})


@pytest.mark.parametrize(
    "text",
    [
        "3",
        "1+1+1",
        "1+2+0",
        "1+2=4",
        "-1+4",
        "1**2+2",
        "3//1",
        "__import__('os')",
        "1+2 or 5",
        "0x1+2",
        "1,2",
        "1_+2",
        "",
    ]
    + [
        "(" * 400 + "1+2" + ")" * 400,
        "1+2" + " " * 10_000,
        "2/0+1",
        "(1+2",
        "9**9**9",
        "2(1)",
        "1.0+2",
        "1+2\n",
        "01+2",
    ],
)
def test_what_is_no_way_to_three(text):
    assert not reaches(text, [1, 2], 3)


@given(st.lists(st.integers(1, 30), min_size=3, max_size=3), st.integers(-50, 900))
def test_countdown_agrees_with_plain_fractions(numbers, target):
    """Every expression (a o b) o c and a o (b o c), evaluated by Python itself with Fractions."""
    for order, (first, second) in product(list(permutations(numbers))[::2], product("+-*/", repeat=2)):
        for form in ("({0}{3}{1}){4}{2}", "{0}{3}({1}{4}{2})"):
            try:
                value = eval(form.format(*(f"Fraction({n})" for n in order), first, second), {"Fraction": Fraction})
            except ZeroDivisionError:
                value = None
            text = form.format(*order, first, second)
            assert reaches(text, numbers, target) == (value == target)
            if value is not None and value.denominator == 1:
                assert reaches(text, numbers, int(value)) and not reaches(text, [*numbers, 1], int(value))


@pytest.mark.parametrize("completion", ["<think>7+8=15</think>85", "<think>x</think>85.", "85", "<think>x</think>085"])
def test_arithmetic_is_right_to_the_letter(completion):
    problem = make_problem("add", 47, 38)
    row = json.loads(json.dumps(vars(problem) | {"more": 1}))
    task = make_task(TaskConfig(name="arithmetic"))
    assert task.messages(row) == user("47+38=") and task.right(row) == "85"
    assert task.accuracy(completion, row) == accuracy_reward(completion, "85")
    with pytest.raises(ValueError, match="answer is '86', but this problem's is '85'"):
        task.accuracy(completion, row | {"answer": "86"})


def test_other_tasks_do_not_bring_arithmetic(tmp_path: Path):
    (tmp_path / "mine.py").write_text("def ask(row): return 'x'\ndef score(completion, row): return 1\n")
    code = (
        "import sys\n"
        "from deepseek_jax.rl.tasks import TaskConfig, make_task\n"
        "from deepseek_jax.rl.grader import Grader\n"
        "for name in ('rows', 'gsm8k', 'countdown', 'mine.py:ask'):\n"
        "    with Grader(('accuracy', 'format', 'mine.py:score'), task=make_task(TaskConfig(name=name))): pass\n"
        "print([n for n in sys.modules if 'arithmetic' in n or 'problems' in n or 'workflows' in n])"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"
    assert isinstance(make_task(TaskConfig(name="arithmetic")), Task) and "arithmetic" in TASKS


def test_mathematics():
    pytest.importorskip("math_verify", reason="math-verify (the extra rewards) is not installed")
    task = make_task(TaskConfig(name="maths"))
    row = {"problem": "What is half of $x$?", "answer": "\\frac{x}{2}"}
    assert task.messages(row)[0]["content"].startswith("What is half of $x$?\nReason step by step")
    assert [task.accuracy(text, row) for text in ("\\boxed{0.5x}", "<think>x</think>\\boxed{x}", "")] == [1, 0, 0]
    assert task.accuracy("x", {"answer": None}) is None
    own = make_task(TaskConfig(name="maths", prompt="Problem", answer="solution"))
    row = {"Problem": "?", "solution": "So $\\boxed{3}$, then \\boxed{\\frac{1}{4}}."}
    assert own.right(row) == "\\frac{1}{4}" and own.accuracy("\\boxed{0.25}", row) == 1
    with Grader(own.rewards, task=own, workers=1) as grader:
        assert grader.grade(["<think>x</think>\\boxed{.25}", "\\boxed{25}"], [row] * 2).total_N.tolist() == [1.2, 0]
        with pytest.raises(ValueError, match="t:1: reward maths: no answer in"):
            grader.check([Record({"Problem": "?", "solution": "\\boxed{}"}, "t:1")])


@pytest.mark.parametrize(
    ("name", "row", "right"),
    [
        ("math", {"problem": "?", "solution": "so $\\boxed{\\frac{1}{2}}$", "level": "Level 1"}, "\\frac{1}{2}"),
        ("aime", {"id": 60, "problem": "?", "solution": "\\boxed{1}", "answer": "204"}, "204"),
        ("aime", {"ID": "2024-I-4", "Problem": "?", "Solution": "x", "Answer": 25}, "25"),
        ("aime", {"question": "?", "answer": "025"}, "025"),
        ("cnmo", {"question": "?", "answer": "$\\sqrt{2}$"}, "$\\sqrt{2}$"),
        ("gpqa", {"Question": "?", "Correct Answer": 1} | {f"Incorrect Answer {n}": 0 for n in (1, 2, 3)}, ""),
        ("mmlu", {"question": "?", "subject": "law", "choices": ["a", "b", "c", "d"], "answer": 3}, "D"),
        ("mmlu_pro", {"question": "?", "options": [*"abcdefghij"], "answer": "J", "answer_index": 9}, "J"),
    ],
)
def test_presets_know_the_columns_of_known_datasets(name, row, right):
    if name in ("math", "aime", "cnmo"):
        pytest.importorskip("math_verify", reason="math-verify (the extra rewards) is not installed")
    task = make_task(TaskConfig(name=name))
    said = task.right(row)
    assert task.messages(row)[0]["content"].startswith("?\n") and said is not None and said == (right or said)
    number = said.removeprefix("0") if name == "aime" else said
    assert [task.accuracy(f"<think>A</think>\\boxed{{{text}}}", row) for text in (number, "17")] == [1, 0]
    own = make_task(TaskConfig(name=name, template="Now: {question|problem|Problem|Question}"))
    assert own.messages(row)[0]["content"] == "Now: ?"


@pytest.mark.skipif(not MATH.exists(), reason=f"there is no {MATH}")
def test_maths_answers_are_the_boxes_of_its_solutions():
    task = make_task(TaskConfig(name="math"))
    rows = json.loads(MATH.read_text())
    assert [task.right(row) for row in rows] == [row["answer"] for row in rows]


def test_what_breaks_math_verify_is_wrong_and_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(mathematics, "check_arguments", lambda *given: None)
    (tmp_path / "broken.py").write_text("def score(completion, row):\n    return 1 / (completion != 'x')\n")
    monkeypatch.setitem(NAMED, "maths", dataclasses.replace(NAMED["maths"], file=tmp_path / "broken.py"))
    task = make_task(TaskConfig(name="maths"))
    assert [task.accuracy(text, {"answer": "4"}) for text in "xyx"] == [0, 1, 0]
    assert caplog.text.count("ZeroDivisionError") == 1


MEETING = """
import os, time
def score(completion, row):
    while completion == "hang" or len(os.listdir({folder!r})) < 2:
        open({folder!r} + "/" + completion, "w").close()
        time.sleep(0.01)
    return 1.0
"""


@pytest.mark.parametrize("name", ["maths", "mixed"])
def test_answers_of_mathematics_are_graded_side_by_side_and_one_that_hangs_is_killed(name, tmp_path, monkeypatch):
    """Each of the first two is graded when both are being graded, or it would time out."""
    (tmp_path / "met").mkdir()
    (tmp_path / "meeting.py").write_text(MEETING.format(folder=str(tmp_path / "met")))
    monkeypatch.setattr(mathematics, "check_arguments", lambda *given: None)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setitem(NAMED, "maths", dataclasses.replace(NAMED["maths"], file=tmp_path / "meeting.py"))
    task, row = make_task(TaskConfig(name=name)), {"problem": "?", "answer": "4", "task": "maths"}
    task.check([row])
    assert score_all(task.accuracy, ["first", "second"], [row] * 2) == [1, 1]
    monkeypatch.setattr(mathematics, "_SECONDS", 0.5)
    task = make_task(TaskConfig(name=name))
    task.check([row])
    assert score_all(task.accuracy, ["hang", "third", "fourth"], [row] * 3) == [0, 1, 1]


def test_multiple_choice():
    task = make_task(TaskConfig(name="choice"))
    mmlu = {"question": "Of France?", "choices": ["Nice", "Paris", "Lyon"], "answer": 1}
    pro = {"question": "Of France?", "options": ["Nice", "Paris"], "answer": "B", "answer_index": 1}
    assert task.messages(mmlu)[0]["content"].startswith("Of France?\n\n(A) Nice\n(B) Paris\n(C) Lyon\n\nThink")
    for row in (mmlu, pro):
        assert task.right(row) == "B"
        assert [task.accuracy(text, row) for text in ("#### B", "The answer is (A).", "<think>B</think>")] == [1, 0, 0]
    own = make_task(TaskConfig(name="choice", prompt="q", answer="a", template="{question} {n}\n{options}"))
    assert own.messages({"q": "?", "n": 3, "options": [1, 2], "a": "a"}) == user("? 3\n(A) 1\n(B) 2")


def test_gpqa_comes_in_an_order_of_its_own():
    task, orders = make_task(TaskConfig(name="choice")), set()
    for i in range(40):
        row = {"Question": f"{i}?", "Correct Answer": "yes"} | {f"Incorrect Answer {n}": f"no {n}" for n in (1, 2, 3)}
        asked, right = task.messages(row)[0]["content"], task.right(row)
        assert f"({right}) yes" in asked and all(f"no {n}" in asked for n in (1, 2, 3))
        assert asked == task.messages(row)[0]["content"] and task.accuracy(f"#### {right}", row) == 1
        orders.add(right)
    assert orders == {*"ABCD"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "?", "options": ["a", "b"], "answer": "C"}, "the answer is 'C'; it must be one of A to B, or 0"),
        ({"question": "?", "options": ["a", "b"], "answer": 2}, "the answer is 2; it must be one of A to B, or 0 to 1"),
        ({"question": "?", "options": ["a", "b"], "answer": True}, "the answer is True"),
        ({"question": "?", "options": "ab", "answer": "A"}, "the options are 'ab'; they must be a list of 2 to 26"),
        ({"question": "?", "answer": "A"}, 'no column "options"; it has question, answer'),
        ({"question": 3, "options": ["a", "b"], "answer": "A"}, "the question is of type int"),
        ({"Question": "?", "Correct Answer": "x"}, 'no column "Incorrect Answer 1"'),
    ],
)
def test_what_is_no_multiple_choice_is_named(row, message):
    with pytest.raises(ValueError, match=message):
        make_task(TaskConfig(name="choice")).check([row])
