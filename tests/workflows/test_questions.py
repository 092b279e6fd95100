"""``eval`` with tasks: answers are kept, a run that was cut off goes on, and nothing of another model is taken."""

import dataclasses
import json
import shutil
from decimal import Decimal

import numpy as np
import pytest
from model.tiny import weights, whole
from small import SPEAKER, tokenizer

from deepseek_jax.data.text import read_rows
from deepseek_jax.evals.samples import pass_at_1
from deepseek_jax.files import read_json_lines
from deepseek_jax.rl import arithmetic
from deepseek_jax.rl.tasks import TaskConfig, make_task
from deepseek_jax.workflows.questions import Answers, Asking, as_vote, ask_questions, figures

MODEL = whole(SPEAKER, *weights(SPEAKER), tokenizer())
ASKING = Asking(samples=3, max_tokens=8, temperature=1.0, top_p=1.0)


@pytest.fixture
def task(tmp_path) -> TaskConfig:
    problems = arithmetic.sample_problems(np.random.default_rng(0), 5, arithmetic.KINDS, held_out=False)
    arithmetic.write_jsonl(tmp_path / "problems.jsonl", problems)
    return TaskConfig(name="arithmetic", path=(str(tmp_path / "problems.jsonl"),))


def lines(folder) -> list[dict]:
    (path,) = folder.glob("arithmetic-*.jsonl")
    return read_json_lines(path)


def test_answers_are_kept_and_a_run_goes_on(task, tmp_path):
    whole_run, _ = ask_questions(MODEL, [Answers(task, ASKING)], ASKING, tmp_path / "whole", batch_size=4)
    (found,) = whole_run.values()
    kept = lines(tmp_path / "whole")
    assert [(line["question"], line["sample"]) for line in kept] == [(q, s) for q in range(5) for s in range(3)]
    assert len({line["completion"] for line in kept}) > 5  # samples differ
    correct = np.reshape([line["correct"] for line in kept], (5, 3))
    assert (found["pass@1"], found["stderr"]) == pass_at_1(correct.tolist())
    assert found["questions"] == 5 and {"pass@2", "cons@2", "pass@3", "cons@3"} <= set(found)
    assert json.loads((tmp_path / "whole" / "result.json").read_text()) == whole_run

    # Cut off within a line; what is missing is asked beside other rows, and says the same.
    (path,) = (tmp_path / "whole").glob("arithmetic-*.jsonl")
    path.write_text("".join(json.dumps(line) + "\n" for line in kept[:5]) + '{"question": 1, "sam')
    again, _ = ask_questions(MODEL, [Answers(task, ASKING)], ASKING, tmp_path / "whole", batch_size=16)
    assert again == whole_run
    assert lines(tmp_path / "whole") == kept

    # In turn they are the same.
    turns = dataclasses.replace(ASKING, batching="continuous")
    assert ask_questions(MODEL, [Answers(task, turns)], turns, tmp_path / "turns", batch_size=4)[0] == whole_run
    assert lines(tmp_path / "turns") == kept

    # Answers are to what is asked, wherever that lies.
    (tmp_path / "problems.jsonl").rename(tmp_path / "moved.jsonl")
    moved = dataclasses.replace(task, path=(f"{tmp_path}/moved.jsonl",))
    assert Answers(moved, ASKING).file == path.name
    assert Answers(dataclasses.replace(moved, system="Be brief."), ASKING).file != path.name


def test_wrong_answers_vote_by_what_the_grader_reads(tmp_path):
    """4 of 7 say 17 in their own words and digits, three the right 18: the majority is wrong."""
    (tmp_path / "rows.jsonl").write_text('{"question": "How many?", "answer": "so #### 18"}\n')
    task = make_task(TaskConfig(name="gsm8k", path=(str(tmp_path / "rows.jsonl"),)))
    (row,) = read_rows((str(tmp_path / "rows.jsonl"),))
    texts = [f"By way {number}, the answer is 17{'.00' * (number % 2)}." for number in range(4)] + ["It is 18."] * 3
    for number, vote in (("-0.50", "-0.5"), ("100", "100"), ("-0.0", "0"), ("1" * 40, "1" * 40)):
        assert as_vote(Decimal(number)) == vote
    assert task.said is not None
    lines = [
        {"said": as_vote(task.said(text, row)), "correct": task.accuracy(text, row) == 1, "ended": True, "tokens": 9}
        for text in texts
    ]
    found = figures(lines, 7, votes=True)
    assert found["pass@1"] == pytest.approx(3 / 7) and found["cons@7"] == 0.0
    assert "cons@7" not in figures(lines, 7, votes=False)


def test_rows_that_cannot_be_used_are_skipped_where_that_is_said(tmp_path, caplog):
    (tmp_path / "rows.jsonl").write_text(
        '{"prompt": "1+1=", "answer": "2"}\n{"prompt": "1+2="}\n{"prompt": 3, "answer": 3}\n'
        '{"prompt": "2+2=", "answer": 4}\n'
    )
    config = TaskConfig(path=(str(tmp_path / "rows.jsonl"),))
    asking = Asking(samples=1, max_tokens=4, skip_unusable=True)
    answers = Answers(config, asking)
    found, folder = ask_questions(MODEL, [answers], asking, tmp_path / "out", batch_size=2)
    found = found[answers.name]
    assert (found["questions"], found["skipped"]) == (2, 2)
    assert [line["row"].rpartition(":")[2] for line in read_json_lines(folder / answers.file)] == ["1", "4"]
    assert caplog.text.count("skipped, as all such") == 1 and 'rows.jsonl:2: no column "answer"' in caplog.text
    with pytest.raises(ValueError, match="rows.jsonl:3"):
        Answers(config, Asking())
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+2="}\n')
    with pytest.raises(ValueError, match="no rows to ask"):
        Answers(config, asking)


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("code", {"prompt": "x", "tests": "assert f() == 1"}),
        ("humaneval", {"prompt": "def f():\n", "entry_point": "f", "test": "", "canonical_solution": "    return 1\n"}),
    ],
)
def test_problems_without_a_right_answer_as_text_are_asked_and_have_no_votes(name, row, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    asking = Asking(samples=2, max_tokens=4)
    answers = Answers(TaskConfig(name=name, path=(str(tmp_path / "rows.jsonl"),), template="{prompt}"), asking)
    found, folder = ask_questions(MODEL, [answers], asking, tmp_path / "out", batch_size=2)
    assert found[answers.name]["pass@2"] == 0 and "cons@2" not in found[answers.name]
    assert [line["correct"] for line in read_json_lines(folder / answers.file)] == [False, False]


@pytest.mark.parametrize(
    ("name", "row", "right"),
    [
        ("aime", {"Problem": "x", "Answer": "33"}, "33"),
        ("aime", {"Problem": "x", "solution": "so \\boxed{7}"}, "7"),
        ("aime", {"Problem": "x"}, None),
        ("math", {"problem": "x"}, None),
        ("mixed", {"task": "aime", "Problem": "x", "Answer": "33"}, "33"),
        ("mixed", {"task": "rows", "prompt": "x"}, None),
    ],
)
def test_rows_without_a_right_answer_are_asked_too_and_the_others_keep_theirs(name, row, right, tmp_path):
    pytest.importorskip("math_verify", reason="math-verify (the extra rewards) is not installed")
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    asked = Answers(TaskConfig(name=name, path=(str(tmp_path / "rows.jsonl"),)), ASKING, unanswered=True)
    assert asked.task.right(asked.rows[0]) == right


def test_more_samples_go_on_from_those_that_are_there(task, tmp_path, monkeypatch):
    few, asked = dataclasses.replace(ASKING, samples=1), []
    original = Answers._ask
    monkeypatch.setattr(Answers, "_ask", lambda self, *given: asked.extend(given[1]) or original(self, *given))
    found = []
    for asking in (few, ASKING, few):
        answers = Answers(task, asking)
        found.append(ask_questions(MODEL, [answers], asking, tmp_path / "out", batch_size=4)[0][answers.name])
    every = [(row, sample) for row in range(len(answers.rows)) for sample in range(ASKING.samples)]
    assert sorted(asked) == every and [figures["samples"] for figures in found] == [1, ASKING.samples, 1]
    assert found[0] == found[2]
    alone = ask_questions(MODEL, [Answers(task, ASKING)], ASKING, tmp_path / "alone", batch_size=4)[0][answers.name]
    assert found[1] == alone


def test_what_does_not_fit_is_refused(task, tmp_path):
    once = Asking(samples=1, count=1, max_tokens=4)
    ask_questions(MODEL, [Answers(task, once)], once, tmp_path / "out", batch_size=1)
    longer = dataclasses.replace(once, max_tokens=5)
    with pytest.raises(ValueError, match="answers by other settings, {'max_tokens': 4.*give another --out"):
        ask_questions(MODEL, [Answers(task, longer)], longer, tmp_path / "out", batch_size=1)
    with pytest.raises(ValueError, match="ask once"):
        Asking(temperature=0.0)
    with pytest.raises(ValueError, match="top_p=2"):
        Asking(top_p=2.0)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1="}\n')
    rows = TaskConfig(path=(str(tmp_path / "rows.jsonl"),))
    with pytest.raises(ValueError, match='rows.jsonl:1: no column "answer"'):
        Answers(rows, ASKING)
