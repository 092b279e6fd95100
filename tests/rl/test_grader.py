"""Grading: specifications, what a user's function sees and may do, and processes that hang, die, print and raise."""

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from deepseek_jax.data.text import Record
from deepseek_jax.rl.grader import Grader
from deepseek_jax.rl.grades import Grades
from deepseek_jax.rl.reward_spec import RewardSpec, parse_reward
from deepseek_jax.rl.rewards import accuracy_reward, format_reward
from deepseek_jax.rl.tasks import Task, TaskConfig, make_task

MINE = """
import os, sys, time, subprocess

def digits(completion, row):
    return sum(c.isdigit() for c in completion) / row["length"]

def naughty(completion, row):
    if completion == "hang":
        while True: pass
    if completion == "sleep":
        subprocess.run(["sleep", "100"])
    if completion == "die":
        os._exit(7)
    if completion == "print":
        print('{"score": 5}')
        sys.__stdout__.write("x\\n"); sys.__stdout__.flush()
        os.write(1, b'{"score": 6}\\n')
        return float(sys.stdin.read() == "")
    if completion == "exit":
        sys.exit()
    if completion == "raise":
        raise KeyError("a\\u2028b\\ud800")
    if completion == "none":
        return None
    if completion == "text":
        return "1"
    if completion == "nan":
        return float("nan")
    return 1

def echo(completion, row):
    return float(completion == row["said"] and row["when"] == "2024-05-01" and "jax" not in sys.modules)

def pid(completion, row):
    return os.getpid()
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


def rows(count: int) -> list[Record]:
    return [Record({"length": 4}, f"t.jsonl:{i + 1}") for i in range(count)]


@contextlib.contextmanager
def grader(*specs: str, task: Task | None = None) -> Iterator[Grader]:
    with Grader(specs, task=task, time_limit=1.0, workers=2) as made:
        yield made


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("accuracy", RewardSpec("accuracy", 1.0)),
        ("format=-0.2", RewardSpec("format", -0.2)),
        ("length:900:100=0.5", RewardSpec("length", 0.5, arguments=(900, 100))),
        ("language:zh", RewardSpec("language", 1.0, arguments=("zh",))),
        ("a=b/mine.py:score", RewardSpec("mine.score", 1.0, ("a=b/mine.py", "score"))),
        ("a=b/mine.py:score=1e-1", RewardSpec("mine.score", 0.1, ("a=b/mine.py", "score"))),
    ],
)
def test_specifications(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, spec: RewardSpec):
    monkeypatch.chdir(tmp_path)
    Path("a=b").mkdir()
    Path("a=b/mine.py").write_text("")
    assert parse_reward(text) == spec


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ((), "expected at least one"),
        (
            ("acuracy",),
            "reward 'acuracy': expected one of accuracy, .*length, model, or file.py:function",
        ),
        (("",), "reward '': expected one of"),
        (("mine.py",), "reward 'mine.py': expected one of"),
        (("format=",), "weight '' is no finite number"),
        (("format=x",), "weight 'x' is no finite number"),
        (("format=nan",), "weight 'nan' is no finite number"),
        (("format=1=2",), "expected NAME"),
        (("none.py:f=1",), r"none\.py:f: there is no file none\.py"),
        (("format", "format=2"), "none of the same name twice"),
        (("accuracy",), "accuracy needs a task"),
        (("maths",), "maths needs a task"),
        (("choice",), "choice needs a task"),
        (("format:3",), "reward 'format:3': format takes no arguments, got 3"),
        (("length",), "reward 'length': length takes :LIMIT:BUFFER, got none"),
        (("length:9:x=2",), "BUFFER of length is 'x'; it must be a whole number"),
        (("length:9:10",), "length of 9 words with a buffer of 10: expected 1 <= buffer <= limit"),
        (("repetition:0",), "repetition of 0 words: expected at least 1"),
        (("language:fr",), "language 'fr': expected one of en, zh, ja"),
    ],
)
def test_wrong_specifications_are_named(specs: tuple[str, ...], message: str):
    with pytest.raises(ValueError, match=message):
        Grader(specs)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(completion, row):\n  return 1\n", r"mine\.py: no function score; it has f"),
        ("import nothing_there\n", r"mine\.py: ModuleNotFoundError: No module named 'nothing_there' \(mine\.py:1\)"),
        ("x = 1\ndef score(\n", r"mine\.py: SyntaxError: .*\(mine\.py:2\)"),
        ("def score(completion): pass\n", r"score\(completion\) is called with 2 arguments"),
        ("import os; os._exit(3)\n", r"mine\.py: the process that loads it has ended"),
        ("raise SystemExit(2)\n", r"mine\.py: SystemExit: 2 \(mine\.py:1\)"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_before_training(mine: Path, source: str, message: str):
    mine.write_text(source)
    with pytest.raises(ValueError, match=message):
        Grader((f"{mine}:score",))


def test_the_packages_rewards_and_their_sum(caplog):
    """The demo's rewards come out as they always did: to the letter, Σ by fsum."""
    task = make_task(TaskConfig(prompt="q", answer="a"))
    texts = ["<think>x</think>85", "<think>x</think>84", "85", "<think>x</think>85\n1"]
    given = [Record({"q": "?", "a": answer}, f"t:{i}") for i, answer in enumerate(["85", "85", None, "85"])]
    with Grader(("accuracy=1.0", "format=0.2"), task=task) as grader:
        grader.check(given)
        assert caplog.messages == ["reward accuracy does not apply to 1 of 4 rows"]
        grades = grader.grade(texts, given)
        np.testing.assert_array_equal(grades.rewards["accuracy"], [1, 0, np.nan, 0])
        np.testing.assert_array_equal(grades.rewards["format"], [1, 1, 0, 0])
        assert grades.total_N.tolist() == [1.2, 0.2, 0, 0] and grades.total_N.dtype == np.float64
        assert grades.metrics() == pytest.approx({"reward": 0.35, "reward_accuracy": 1 / 3, "reward_format": 0.5})
        broken = [Record({"q": "?"}, "t.jsonl:9")]
        for call in (lambda: grader.check(broken), lambda: grader.grade(["x"], broken)):
            with pytest.raises(ValueError, match=r't\.jsonl:9: reward accuracy: no column "a"; it has q'):
                call()
        with pytest.raises(ValueError, match="1 completions of 2 rows"):
            grader.grade(["x"], given[:2])


def test_what_was_cut_off_is_no_answer_but_a_users_function_reads_it(mine: Path):
    row = {"answer": "14", "length": 2}
    with grader("accuracy", f"{mine}:digits", task=make_task(TaskConfig())) as made:
        grades = made.grade(["14", "14"], [row, row], ended=[True, False])
    assert grades.rewards["accuracy"].tolist() == [1, 0] and grades.rewards["mine.digits"].tolist() == [1, 1]


def test_how_it_is_written_counts_in_what_was_cut_off_too():
    said, row = "<think>你好 again and again", {"answer": "again"}
    with grader("tags", "language=0.5", "repetition:1=2", "choice", task=make_task(TaskConfig())) as made:
        made.check([row])
        grades = made.grade([said], [row], ended=[False])
    found = {name: scores[0] for name, scores in grades.rewards.items()}
    assert found == pytest.approx({"tags": 0, "language": 3 / 5, "repetition": -1 / 6, "choice": 0})
    with grader("language", task=make_task(TaskConfig())) as made, pytest.raises(ValueError, match="t:3: .*'Welsh'"):
        made.check([Record({"language": "Welsh"}, "t:3")])


def test_arithmetic_is_graded_by_its_rules():
    from deepseek_jax.rl.arithmetic import make_problem

    problem = make_problem("sub", 52, 38)
    texts = ["<think>x</think>14", "<think>x</think>41", "14", "", "<think>x</think> 14\n", "<think>x</think>+14"]
    with Grader(("accuracy=1.0", "format=0.2"), task=make_task(TaskConfig(name="arithmetic"))) as grader:
        grades = grader.grade(texts, [vars(problem)] * len(texts))
    expected = [accuracy_reward(text, problem.answer) + 0.2 * format_reward(text) for text in texts]
    assert grades.total_N.tolist() == expected
    assert grades.rewards["accuracy"].tolist() == [accuracy_reward(text, problem.answer) for text in texts]
    assert grades.rewards["format"].tolist() == [format_reward(text) for text in texts]


def test_a_users_function_reads_a_column_and_is_weighted(mine: Path):
    with grader(f"{mine}:digits=2", "format") as made:
        grades = made.grade(["12ab", "<think>x</think>4", ""], rows(3))
    assert grades.total_N.tolist() == [1.0, 1.5, 0.0]
    assert list(grades.rewards) == ["mine.digits", "format"]
    counts = {"reward_timeouts": 0, "reward_crashes": 0, "reward_errors": 0}
    assert grades.metrics() == pytest.approx(
        {"reward": 2.5 / 3, "reward_mine.digits": 0.25, "reward_format": 1 / 3} | counts
    )


FAILING = ("hang", "die", "raise", "exit", "text", "nan", "sleep")


def test_hanging_dying_printing_and_raising_calls(
    mine: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
):
    texts = ["ok", "hang", "die", "print", "raise", "exit", "none", "text", "nan", "sleep", "ok", "die", "ok"]
    with grader(f"{mine}:naughty=3") as made:
        grades = made.grade(texts, rows(len(texts)))
        expected = [1 if text in ("ok", "print") else math.nan for text in texts]
        np.testing.assert_array_equal(grades.rewards["mine.naughty"], expected)
        np.testing.assert_array_equal(grades.total_N, np.nan_to_num(3 * np.array(expected)))
        found = grades.metrics()
        assert {name: found[f"reward_{name}"] for name in ("timeouts", "crashes", "errors")} == {
            "timeouts": 2,
            "crashes": 2,
            "errors": 4,
        }
        assert found["reward_mine.naughty"] == 1
        np.testing.assert_array_equal(grades.failed_N, [text in FAILING for text in texts])
        with pytest.raises(ValueError, match="fails for every completion; for t.jsonl:1: timeout: no answer"):
            made.grade(["hang"] * 2, rows(2))
        assert made.grade(["ok"], rows(1)).total_N.tolist() == [3]
    logged = [record.getMessage() for record in caplog.records]
    assert len(logged) == 3
    assert "reward mine.naughty: timeout for t.jsonl:2 (no answer within 1 s)" in logged[0]
    assert "crash for t.jsonl:3 (its process ended with code 7)" in logged[1]
    assert "error for t.jsonl:5 (KeyError" in logged[2] and "(mine.py:22)" in logged[2]
    printed = capfd.readouterr()
    assert printed.out == "" and '{"score": 6}' in printed.err


def test_a_reward_that_never_has_a_score_is_said_once(mine: Path, caplog: pytest.LogCaptureFixture):
    with grader(f"{mine}:naughty", "format") as made:
        for texts in (["none", "ok"], ["none", "none"], ["none", "none"]):
            made.grade(texts, rows(2))
    message = "reward mine.naughty: None for all 2 completions of a batch, which it teaches nothing; said once"
    assert caplog.messages == [message]


def test_a_reward_that_always_raises_stops_the_run(mine: Path):
    with grader(f"{mine}:digits") as made:
        given = [Record({"size": 4}, f"t.jsonl:{i + 1}") for i in range(3)]
        message = r"mine\.digits fails for every completion; for t\.jsonl:1: error: KeyError: 'length' \(mine\.py:5\)"
        with pytest.raises(ValueError, match=message):
            made.grade(["a", "b", "c"], given)
        assert made.grade(["1"], rows(1)).total_N.tolist() == [0.25]
    with grader(f"{mine}:naughty") as made, pytest.raises(ValueError, match="t.jsonl:1: crash: its process ended"):
        made.grade(["die", "raise"], rows(2))


@pytest.mark.parametrize(
    "said", ["line\u2028line\u2029\x85\r\n", "half \ud800", "\x00", "数" * 200_000, ""], ids="abcde"
)
def test_any_text_arrives_and_no_jax_is_imported(mine: Path, said: str):
    import datetime

    row = {"said": said, "when": datetime.date(2024, 5, 1), "bytes": b"\xff"}
    with grader(f"{mine}:echo") as made:
        assert made.grade([said], [row]).total_N.tolist() == [1]


STEPS = """
import json

def steps(completion, row):
    return json.loads(completion) if completion != "null" else None
"""


def test_a_reward_of_steps_is_weighted_summed_and_joined(tmp_path: Path):
    (tmp_path / "mine.py").write_text(STEPS)
    texts = ["[[3, 0.5], [0, -1]]", "[]", "null", "2", "[[16, 1]]       "]
    with grader(f"{tmp_path}/mine.py:steps=2", "format") as made:
        grades = made.grade(texts, rows(5))
        assert grades.steps_N == [[(3, 1.0), (0, -2.0)], [], [], [], [(16, 2.0)]] and len(texts[4]) == 16
        np.testing.assert_array_equal(grades.rewards["mine.steps"], [-0.5, 0, np.nan, 2, 1])
        assert grades.total_N.tolist() == [0, 0, 0, 4, 0]  # of answers as wholes
        assert grades.metrics()["reward"] == pytest.approx((-1 + 4 + 2) / 5)
        twice = Grades.joined([grades, made.grade(["1", "["], rows(2))])
    assert twice.total_N.tolist() == [0, 0, 0, 4, 0, 2, 0] and twice.failed_N.tolist() == [False] * 6 + [True]
    assert len(twice.steps_N) == 7 and len(twice.rewards["format"]) == 7
    assert twice.failures == {"mine.steps": {"timeout": 0, "crash": 0, "error": 1}}


@pytest.mark.parametrize("said", ["[[18, 1]]x", "[[0.5, 1]]", "[[-1, 1]]", "[[true, 1], 3]", "[[1, NaN]]", "[[1]]"])
def test_steps_that_are_none_are_errors(tmp_path: Path, said: str):
    (tmp_path / "mine.py").write_text(STEPS.replace("json.loads(completion)", 'json.loads(completion.rstrip("x"))'))
    with grader(f"{tmp_path}/mine.py:steps") as made:
        grades = made.grade([said, "1"], rows(2))
        assert grades.failed_N.tolist() == [True, False]
        with pytest.raises(ValueError, match=r"is no \(end, number\) of a step, with an end of 0…\d+ characters"):
            made.grade(["[[99, 1]]"], rows(1))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z" if Path("/proc").is_dir() else True


def eventually(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def test_processes_are_kept_and_end_with_the_grader(mine: Path):
    with grader(f"{mine}:pid") as made:
        first = {made.grade([""], rows(1)).total_N[0] for _ in range(3)}
        assert len(first) == 1
    assert not alive(int(first.pop()))
    made.close()


def test_a_hanging_process_ends_with_its_parent(mine: Path):
    code = (
        "import threading, time\n"
        "from deepseek_jax.rl.grader import Grader\n"
        f"made = Grader(('{mine}:pid', '{mine}:naughty'), time_limit=100, workers=1)\n"
        "threading.Thread(target=lambda: made.grade(['hang'], [{}]), daemon=True).start()\n"
        "pid = made._pool._workers[0]._process.pid\n"
        "time.sleep(0.3)\n"
        "print(pid, flush=True)\n"
        "time.sleep(100)\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert alive(worker)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert eventually(lambda: not alive(worker))
