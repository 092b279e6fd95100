"""Curves of accuracy: what is written, that a run goes on, and that each equals what its answers say."""

import dataclasses
import json

import numpy as np
import pytest
from model.tiny import weights, whole
from small import SPEAKER, tokenizer

from deepseek_jax.evals.budget import Reply, Words
from deepseek_jax.evals.samples import cons_at_k
from deepseek_jax.files import read_json_lines
from deepseek_jax.rl import arithmetic
from deepseek_jax.rl.tasks import TaskConfig
from deepseek_jax.workflows import scaling
from deepseek_jax.workflows.questions import Answers, Asking, ask_questions
from deepseek_jax.workflows.scaling import Scaling, scale

MODEL = whole(SPEAKER, *weights(SPEAKER), tokenizer())
ASKING = Asking(samples=4, max_tokens=8, temperature=1.0, top_p=1.0)
SCALING = Scaling(budgets=(8, 2), waits=(0, 2), answer_tokens=8, majority=True, words=Words("<think>", "W", "</think>"))


@pytest.fixture
def answers(tmp_path) -> Answers:
    problems = arithmetic.sample_problems(np.random.default_rng(0), 3, arithmetic.KINDS, held_out=False)
    arithmetic.write_jsonl(tmp_path / "problems.jsonl", problems)
    return Answers(TaskConfig(name="arithmetic", path=(str(tmp_path / "problems.jsonl"),)), ASKING)


def rewritten(path) -> None:
    """Answers of which some are right."""
    lines = read_json_lines(path)
    for number, line in enumerate(lines):
        line |= {"correct": number % 3 == 0, "said": f"{number % 2}"}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_curves(answers, tmp_path):
    folder = ask_questions(MODEL, [answers], ASKING, tmp_path / "out", batch_size=4)[1]
    rewritten(folder / answers.file)
    curves = scale(MODEL, [answers], SCALING, folder, batch_size=4)
    assert json.loads((folder / "scaling.json").read_text()) == {"curves": curves}
    majority, cut, waited = curves
    lines = read_json_lines(folder / answers.file)
    said, correct = ([[line[name] for line in lines[s : s + 4]] for s in (0, 4, 8)] for name in ("said", "correct"))
    assert (majority["kind"], majority["x"]) == ("majority", [1, 2, 4])
    assert majority["accuracy"] == [cons_at_k(said, correct, k) for k in (1, 2, 4)]
    assert (cut["kind"], cut["x"], cut["label"]) == ("budget", [2, 8], "cut") and "Wait" in waited["label"]
    for curve in (cut, waited):
        assert set(curve) == {"task", "kind", "questions", "x", "accuracy", "stderr", "label", "tokens"}
        assert curve["tokens"][0] <= 2 and curve["tokens"][1] <= 8

    # The same again from what is kept, and cut off in the middle.
    (path, *_) = folder.glob("*-thoughts-*.jsonl")
    whole_text = path.read_text()
    path.write_text("\n".join(whole_text.split("\n")[:5]) + '\n{"question": 1')
    assert scale(MODEL, [answers], SCALING, folder, batch_size=3) == curves and path.read_text() == whole_text
    for line in read_json_lines(path):
        assert [answer["budget"] for answer in line["answers"]] == [2, 8]
        assert line["ended"] or line["tokens"] == 8


def test_a_thought_that_ended_by_itself_is_right_as_it_is_without_a_budget(answers, tmp_path, monkeypatch):
    """A task to the letter: what is graded has the thought and its marks."""
    right = [answers.task.right(row) for row in answers.rows]

    def concluded(engine, thoughts, budgets, sampling, *, words):
        texts = [reply for _, reply in zip(thoughts, right, strict=True)]
        return [Reply("<think>x</think>", text, 2, True) for text in texts]

    monkeypatch.setattr(scaling, "conclude", concluded)
    once = dataclasses.replace(ASKING, samples=1)
    answers = Answers(TaskConfig(name="arithmetic", path=(str(tmp_path / "problems.jsonl"),)), once)
    folder = ask_questions(MODEL, [answers], once, tmp_path / "out", batch_size=4)[1]
    (curve,) = scale(
        MODEL, [answers], dataclasses.replace(SCALING, budgets=(8,), waits=(0,), majority=False), folder, batch_size=4
    )
    assert curve["accuracy"] == [1.0]


def test_the_best_by_a_reward(answers, tmp_path, caplog, monkeypatch):
    """By the task's own accuracy the best of k is right where one of them is; by a file's, whatever that prefers."""
    folder = ask_questions(MODEL, [answers], ASKING, tmp_path / "out", batch_size=4)[1]
    lines = read_json_lines(folder / answers.file)
    right = answers.task.right(answers.rows[0])
    for line in lines[1:4:2]:  # two of the first question's
        line |= {"completion": f"<think>x</think>{right}", "correct": True, "ended": True}
    (folder / answers.file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    made, devices = scaling.Grader, []
    monkeypatch.setattr(scaling, "Grader", lambda *given, **more: devices.append(more) or made(*given, **more))
    (curve,) = scale(MODEL, [answers], Scaling(best_of="accuracy"), folder, batch_size=4)
    # A reward model would be read as the model has been, and onto its devices.
    assert (devices[0]["compute"], devices[0]["mesh"]) == (MODEL.compute, MODEL.mesh)
    assert curve["accuracy"] == pytest.approx([2 / 12, 1 / 3, 1 / 3]) and curve["kind"] == "best_of"
    (tmp_path / "mine.py").write_text("def score(completion, row): return -float('</think>' in completion)\n")
    spec = f"{tmp_path / 'mine.py'}:score"
    (curve,) = scale(MODEL, [answers], Scaling(best_of=spec), folder, batch_size=4)
    assert curve["accuracy"] == pytest.approx([2 / 12, 0, 0]) and curve["label"] == spec
    (tmp_path / "mine.py").write_text("def score(completion, row): return None\n")
    with pytest.raises(ValueError, match=r"mine\.score has no score for any answer of arithmetic="):
        scale(MODEL, [answers], Scaling(best_of=spec), folder, batch_size=4)
    answers.task = dataclasses.replace(answers.task, said=None)  # as of code
    assert scale(MODEL, [answers], Scaling(majority=True), folder, batch_size=4) == []
    assert "no majority votes, as its answers cannot be compared" in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"budgets": (0,)}, r"budgets=\(0,\), answer_tokens=1024: must be at least 1"),
        ({"best_of": "nonsense"}, "reward 'nonsense': expected one of"),
        ({"waits": (-1,)}, "must not be negative"),
    ],
)
def test_what_makes_no_sense_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Scaling(**given)
