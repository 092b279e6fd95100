"""Accuracy: who is right, in batches that do not come out even."""

import dataclasses

import numpy as np
import pytest
from model.tiny import weights, whole
from small import SPEAKER, tokenizer

from deepseek_jax.data.chat import encode_prompt
from deepseek_jax.evals.accuracy import Answered, accuracy, accuracy_by, answer
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.generate import Generated
from deepseek_jax.rl import arithmetic
from deepseek_jax.rl.asking import Question
from deepseek_jax.rl.tasks import TaskConfig, make_task

PROBLEMS = arithmetic.sample_problems(np.random.default_rng(0), 7, arithmetic.KINDS, held_out=True)
ROWS = [dataclasses.asdict(problem) for problem in PROBLEMS]
MODEL = whole(SPEAKER, *weights(SPEAKER), tokenizer())


def ask(rows=ROWS, *, batch_size=3, temperature=0.0, seed=0):
    task = make_task(TaskConfig(name="arithmetic"))
    options = {"max_tokens": 12, "temperature": temperature, "batch_size": batch_size, "seed": seed}
    return answer(Engine(MODEL), task, rows, **options)


def test_right_answers_are_counted_row_by_row(monkeypatch):
    """The engine answers problem i: right, with a wrong number, or right but without an end, in turns."""
    prompts = [encode_prompt(tokenizer(), arithmetic.to_prompt(problem)) for problem in PROBLEMS]
    sizes = set()

    def generate_ids(self, rows, sampling, key, experts, filled):
        sizes.add(max(len(rows), filled))
        tokens = np.zeros((len(rows), sampling.max_tokens), np.int32)
        lengths, stopped = [], []
        for row, prompt in enumerate(rows):
            index = prompts.index(prompt)
            text = PROBLEMS[index].answer if index % 3 != 1 else "0"
            ids = [tokenizer().end_think_id, *tokenizer().encode(text)]
            ids += [tokenizer().eos_id] * (index % 3 != 2)
            tokens[row, : len(ids)] = ids
            lengths.append(len(ids))
            stopped.append(index % 3 != 2)
        return Generated(tokens, tokens * 0.0, np.array(lengths), np.array(stopped))  # pyright: ignore

    monkeypatch.setattr(Engine, "generate_ids", generate_ids)
    answered = ask()
    assert [item.question.row for item in answered] == ROWS
    assert [item.question.text for item in answered] == [problem.prompt for problem in PROBLEMS]
    assert [item.correct for item in answered] == [True, False, False, True, False, False, True]
    assert answered[0].completion == "</think>" + PROBLEMS[0].answer
    assert sizes == {3}  # one shape: one program
    assert ask(batch_size=64) == answered and sizes == {3, 7}  # no more than there are


def test_greedy_answers_do_not_depend_on_the_batch():
    completions = [[item.completion for item in ask(batch_size=size)] for size in (2, 4)]
    assert completions[0] == completions[1]


def test_sampled_answers_follow_the_seed():
    found = [[item.completion for item in ask(temperature=1.0, batch_size=4, seed=seed)] for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert len(set(found[0])) > 4


def test_accuracy_has_the_error_of_a_proportion():
    answered = [Answered(Question(ROWS[i], "", [], ""), "", i < 2) for i in range(7)]
    share, error = accuracy(answered)
    assert share == pytest.approx(2 / 7)
    assert error == pytest.approx(np.std([1, 1, 0, 0, 0, 0, 0]) / np.sqrt(7))
    kinds = {kind: [p.kind for p in PROBLEMS[:2]].count(kind) for kind in arithmetic.KINDS}
    total = {kind: [p.kind for p in PROBLEMS].count(kind) for kind in arithmetic.KINDS}
    expected = {kind: kinds[kind] / total[kind] for kind in arithmetic.KINDS}
    assert accuracy_by(answered, "kind") == pytest.approx(expected)
